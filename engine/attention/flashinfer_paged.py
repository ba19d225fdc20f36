"""Chunks by FlashInfer (Ye et al., 2025, https://arxiv.org/abs/2501.01005), decodes by Triton.

FlashInfer reads a paged cache through K and V of one layer as separate tensors, each
[block][kv_head][token][dim] (its layout HND) with strides of its own, of which the last has to be
1 and both have to be alike. Views of Baton's pool [block][kv_head][layer][part][token][dim] are
just that: nothing is copied or laid out anew.

Decodes run in CUDA graphs, which FlashInfer would have to plan anew before each replay, so they
stay with our kernel; so do writes to the pool.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from baton.kv_layout import KvLayout
from engine.attention.interface import AttentionStep
from engine.attention.triton_paged import TritonPagedAttention
from engine.batch import Batch
from engine.gpu.transfers import to_device

_WORKSPACE_BYTES = 128 * 1024 * 1024
"""As its documentation advises."""
_HEAD_DIMS = (64, 128, 256)
_BACKEND = "fa2"
"""The one whose kernels take any strides of blocks and heads."""


def refusal(layout: KvLayout) -> str | None:
    """Why FlashInfer does not take a pool of this layout, as a clause; None if it does."""
    if layout.num_kv_parts != 2:
        return "it takes no pool of one part a token (latent attention) here"
    if layout.dtype != "bfloat16":
        return f"it takes no KV in {layout.dtype}"
    if layout.head_dim not in _HEAD_DIMS:
        sizes = ", ".join(map(str, _HEAD_DIMS))
        return f"it takes heads of {sizes} elements, and the model's have {layout.head_dim}"
    return None


class FlashInferPagedAttention:
    """``triton`` computes decodes, and has the pool; its layout has no ``refusal``."""

    def __init__(self, triton: TritonPagedAttention) -> None:
        assert refusal(triton.layout) is None
        flashinfer: Any = importlib.import_module("flashinfer")
        self.triton = triton
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=triton.device)
        # A plan holds for one window.
        self.wrappers = {
            window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                workspace, kv_layout="HND", backend=_BACKEND
            )
            for window in dict.fromkeys(triton.windows)
        }

    def begin(self, batch: Batch) -> AttentionStep:
        return _FlashInferStep(self, batch)


class _FlashInferStep:
    def __init__(self, attention: FlashInferPagedAttention, batch: Batch) -> None:
        triton = attention.triton
        self._attention = attention
        self._slots = to_device(batch.slot_mapping, triton.device)
        decodes = batch.spans[: batch.num_decodes]
        self._first_row = len(decodes)
        self._has_chunks = len(batch.spans) > len(decodes)
        self._decodes = None
        if decodes:
            longest = max(span.num_context for span in decodes)
            table = to_device(batch.block_table[: len(decodes)].contiguous(), triton.device)
            contexts = torch.tensor([span.num_context for span in decodes], dtype=torch.int32)
            num_splits = triton.num_splits(len(decodes), longest)
            self._decodes = table, to_device(contexts, triton.device), num_splits
        if self._has_chunks:
            self._plan(batch)

    def _plan(self, batch: Batch) -> None:
        """Each wrapper plans for all layers of its window."""
        triton, layout = self._attention.triton, self._attention.triton.layout
        arrays = PagedArrays(batch, layout)
        for window, wrapper in self._attention.wrappers.items():
            wrapper.plan(
                arrays.row_starts,
                arrays.block_starts,
                to_device(arrays.block_ids, triton.device),
                arrays.last_block_lengths,
                triton.num_heads,
                triton.num_kv_heads,
                layout.head_dim,
                layout.block_size,
                causal=True,
                sm_scale=triton.scale,
                # It counts the tokens to the left of the query, without itself.
                window_left=-1 if window is None else window - 1,
                q_data_type=triton.pools[0].dtype,
                kv_data_type=triton.pools[0].dtype,
            )

    def paged_spans(self) -> None:
        return None

    def __call__(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        triton = self._attention.triton
        triton.write(layer, key_value, self._slots)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self._decodes is not None:
            table, contexts, num_splits = self._decodes
            triton.attend_decodes(
                *(layer, query, out), block_table=table, contexts=contexts, num_splits=num_splits
            )
        if self._has_chunks:
            own = triton.pools[layer][:, triton.first_head :][:, : triton.num_kv_heads]
            rows = slice(self._first_row, None)
            wrapper = self._attention.wrappers[triton.windows[layer]]
            wrapper.run(query[rows].contiguous(), (own[:, :, 0], own[:, :, 1]), out=out[rows])
        return out


class PagedArrays:
    """A batch's chunks as FlashInfer names them: int32 on the host.

    ``row_starts`` and ``block_starts`` ([chunks + 1]) say where each chunk's rows and blocks
    begin; ``block_ids`` are those of all, one after another; ``last_block_lengths`` [chunks] are
    the tokens in each one's last block.
    """

    def __init__(self, batch: Batch, layout: KvLayout) -> None:
        chunks = batch.spans[batch.num_decodes :]
        counts = [layout.num_blocks_for(span.num_context) for span in chunks]
        tables = batch.block_table[batch.num_decodes :]
        self.row_starts = _starts([span.num_tokens for span in chunks])
        self.block_starts = _starts(counts)
        self.block_ids = torch.cat(
            [table[:count] for table, count in zip(tables, counts, strict=True)]
        )
        lengths = [(span.num_context - 1) % layout.block_size + 1 for span in chunks]
        self.last_block_lengths = torch.tensor(lengths, dtype=torch.int32)


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
