"""Attention as its definition reads, token by token: the oracle that others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kv_layout import KvLayout
from engine.batch import Batch, Span


class ReferenceAttention:
    """Attention over the pool ``kv`` (``layout.shape``), in float64.

    ``windows`` is one layer's sliding window each, None for none; empty if no layer has one.
    ``scale`` and ``value_dim`` are those of PagedCpuAttention.
    """

    def __init__(
        self,
        layout: KvLayout,
        kv: Tensor,
        windows: tuple[int | None, ...] = (),
        *,
        scale: float | None = None,
        value_dim: int | None = None,
    ) -> None:
        self.layout = layout
        self.kv = kv
        self.windows = windows or (None,) * layout.num_layers
        self.scale = layout.head_dim**-0.5 if scale is None else scale
        self.value_dim = value_dim or layout.head_dim

    def begin(self, batch: Batch) -> _ReferenceStep:
        return _ReferenceStep(self, batch)


class _ReferenceStep:
    def __init__(self, attention: ReferenceAttention, batch: Batch) -> None:
        self._layout = attention.layout
        self._kv = attention.kv
        self._scale = attention.scale
        self._value_dim = attention.value_dim
        self._windows = attention.windows
        self._batch = batch

    def __call__(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        for row, slot in enumerate(self._batch.slot_mapping.tolist()):
            block_id, offset = divmod(slot, self._layout.block_size)
            for head in range(self._layout.num_kv_heads):
                self._kv[block_id, head, layer, :, offset] = key_value[row, :, head]
        out = torch.empty(*query.shape[:2], self._value_dim, dtype=query.dtype)
        for index, span in enumerate(self._batch.spans):
            block_ids = self._batch.block_table[index].tolist()
            for row in range(span.first_row, span.first_row + span.num_tokens):
                out[row] = self._attend(layer, query[row], block_ids, _num_visible(span, row))
        return out

    def paged_spans(self) -> None:
        return None

    def _attend(self, layer: int, query: Tensor, block_ids: list[int], num_visible: int) -> Tensor:
        """One token's heads, [heads, value_dim], over the first ``num_visible`` tokens,
        or those of them in the layer's window."""
        size, window = self._layout.block_size, self._windows[layer]
        first = 0 if window is None else max(0, num_visible - window)
        group = query.shape[0] // self._layout.num_kv_heads
        tokens = [divmod(token, size) for token in range(first, num_visible)]
        heads = []
        for head in range(query.shape[0]):
            pool = self._kv[:, head // group, layer]
            rows = [pool[block_ids[block], :, offset].double() for block, offset in tokens]
            parts = torch.stack(rows, dim=1)
            keys, values = parts[0], parts[-1, :, : self._value_dim]
            scores = keys @ query[head].double() * self._scale
            heads.append(scores.softmax(dim=0) @ values)
        return torch.stack(heads)


def _num_visible(span: Span, row: int) -> int:
    return span.num_context - span.num_tokens + (row - span.first_row) + 1
