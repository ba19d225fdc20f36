"""Attention over the paged pool on a CPU: gathers each context, then multiplies.

The pool [block][kv_head][layer][part][token][dim] is read and written through two
flat views of rows::

    one block of one head, layer, part: ((block * heads + head) * layers + layer) * parts + part
    one token in it:                    the above * block_size + offset

Both are linear in the layer, so their indices are computed once per step. The parts are
K and V; where there is one, V is the beginning of K and is gathered with it.

Scores come from batched matrix products and a softmax rather than from torch's
fused attention, whose CPU kernel multiplies in float32: for a chunk of 512 tokens
in bfloat16 after 512 others that takes 8.0 ms, this 3.1; for 32 decodes at 200
tokens 0.41 ms, this 0.22 (two cores with AVX-512 BF16).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from baton.kv_layout import KvLayout
from engine.attention.native import NativeChunk, NativeDecodes, paged_spans
from engine.attention.window import WindowedChunk, WindowedDecodes
from engine.batch import Batch, Span
from engine.native.kernels import Pool, kernels
from engine.native.layers import PagedSpans
from engine.parallel.group import RankGroups
from engine.parallel.shard import WHOLE

Windows = tuple[int | None, ...]

_NUM_QUERY_ROWS = 128
"""Most query tokens per product: scores stay in the caches, and keys after the
last of them are left out."""

_LEAST_SAVING = 64
"""Blocks of padding that are worth a product of their own for shorter contexts."""


class PagedCpuAttention:
    """Attention over the pool ``kv`` (``layout.shape``) for ``num_heads`` query heads.

    ``windows`` is one layer's sliding window each, None for none; empty if no layer has one.
    ``kv_heads`` are those that the query heads read, by default all; the pool's others are
    left alone. ``scale`` multiplies scores, by default head_dim ** -0.5. ``value_dim`` is
    the length of a value, by default head_dim; only in a pool of one part it may be shorter.
    """

    def __init__(
        self,
        layout: KvLayout,
        kv: Tensor,
        num_heads: int,
        windows: Windows = (),
        *,
        kv_heads: slice = WHOLE,
        scale: float | None = None,
        value_dim: int | None = None,
    ) -> None:
        own_heads = torch.arange(layout.num_kv_heads)[kv_heads]
        assert kv.shape == layout.shape
        assert num_heads % len(own_heads) == 0
        assert len(windows) in (0, layout.num_layers)
        self.layout = layout
        self.num_kv_heads = len(own_heads)
        self._kv_heads = own_heads
        self.num_heads = num_heads
        self.scale = layout.head_dim**-0.5 if scale is None else scale
        self.value_dim = value_dim or layout.head_dim
        assert layout.num_kv_parts == 1 or self.value_dim == layout.head_dim
        self.windows = windows or (None,) * layout.num_layers
        self.dtype = kv.dtype
        self.tokens = kv.view(-1, layout.head_dim)
        self.blocks = kv.view(-1, layout.block_size * layout.head_dim)
        self.kernels = kernels()
        first, last = int(own_heads[0]), int(own_heads[-1])
        self.pool = Pool.of(layout, kv, value_dim=self.value_dim, own_heads=range(first, last + 1))
        width = _NUM_QUERY_ROWS + layout.block_size
        later = torch.ones(_NUM_QUERY_ROWS, width, dtype=torch.bool).triu(1)
        self.causal = torch.zeros(later.shape, dtype=kv.dtype).masked_fill_(later, -math.inf)
        self.nothing = torch.zeros(1, 1, 1, dtype=kv.dtype)
        self._workspace = torch.empty(0, dtype=kv.dtype)

    @property
    def reads_behind(self) -> bool:
        """Whether it reads what lies behind the last token of a block, which must be finite."""
        return self.kernels is None or not self.kernels.attends_chunks(self.layout)

    def begin(self, batch: Batch) -> _PagedCpuStep:
        return _PagedCpuStep(self, batch)

    def block_rows(self, block_table: Tensor) -> Tensor:
        """Rows of ``blocks`` to gather: [layers, parts × tables × heads × blocks]."""
        layout = self.layout
        num_parts = layout.num_kv_parts
        table = block_table.long()[:, None, :] * layout.num_kv_heads
        keys = (table + self._kv_heads[:, None]) * (layout.num_layers * num_parts)
        first = torch.stack([keys + part for part in range(num_parts)]).view(-1)
        return first + torch.arange(layout.num_layers)[:, None] * num_parts

    def token_rows(self, slot_mapping: Tensor) -> Tensor:
        """Rows of ``tokens`` to write, [layers, tokens × parts × heads]."""
        layout = self.layout
        num_parts = layout.num_kv_parts
        block_ids = (slot_mapping // layout.block_size)[:, None, None] * layout.num_kv_heads
        parts = torch.arange(num_parts)[:, None]
        rows = (block_ids + self._kv_heads) * (layout.num_layers * num_parts) + parts
        rows = rows * layout.block_size + (slot_mapping % layout.block_size)[:, None, None]
        layers = torch.arange(layout.num_layers)[:, None] * (num_parts * layout.block_size)
        return rows.view(-1) + layers

    def gather(self, rows: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
        """K and V of the blocks at ``rows``, of ``num_pairs`` tables × heads:
        [pairs, tokens, head_dim] and [pairs, tokens, value_dim].

        They are overwritten by the next call.
        """
        width = self.blocks.shape[1]
        if self._workspace.numel() < len(rows) * width:
            self._workspace = torch.empty(len(rows) * width, dtype=self.blocks.dtype)
        out = self._workspace[: len(rows) * width].view(len(rows), width)
        torch.index_select(self.blocks, 0, rows, out=out)
        parts = out.view(self.layout.num_kv_parts, num_pairs, -1, self.layout.head_dim)
        return parts[0], parts[-1, ..., : self.value_dim]

    def attend_decodes(
        self, query: Tensor, out: Tensor, rows: slice, block_rows: Tensor, mask: Tensor
    ) -> None:
        """Spans of one token each: ``mask`` is added to the scores of what is gathered."""
        num_pairs = (rows.stop - rows.start) * self.num_kv_heads
        keys, values = self.gather(block_rows, num_pairs)
        # The query heads of one KV head are the rows of one product.
        grouped = query[rows].reshape(num_pairs, -1, query.shape[2])
        scores = torch.baddbmm(mask, grouped, keys.transpose(1, 2), alpha=self.scale)
        attended = torch.bmm(scores.softmax(dim=-1), values)
        out[rows] = attended.view(-1, *out.shape[1:])

    def chunk_scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """Scaled products of consecutive tokens' [rows, heads, head_dim] with
        [KV heads, keys, head_dim]: [KV heads, group × rows, keys]."""
        num_rows, _, head_dim = query.shape
        num_kv_heads = self.num_kv_heads
        grouped = query.view(num_rows, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        return torch.baddbmm(
            self.nothing,
            grouped.reshape(num_kv_heads, -1, head_dim),
            keys.transpose(1, 2),
            beta=0,
            alpha=self.scale,
        )


def attention_of(
    config: ModelConfig, layout: KvLayout, kv: Tensor, groups: RankGroups
) -> PagedCpuAttention:
    """A rank's own heads of a model."""
    query = groups.shard.query_heads(config)
    return PagedCpuAttention(
        layout,
        kv,
        query.stop - query.start,
        config.parts.windows,
        kv_heads=groups.shard.kv_heads(config),
        scale=config.attention_scale,
        value_dim=config.value_dim,
    )


class _PagedCpuStep:
    def __init__(self, attention: PagedCpuAttention, batch: Batch) -> None:
        self._attention = attention
        self._batch = batch
        self._slots = batch.slot_mapping
        self._token_rows = None
        if attention.kernels is None:
            self._token_rows = attention.token_rows(batch.slot_mapping)

    def __call__(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        self._write(layer, key_value)
        out = torch.empty(*query.shape[:2], self._attention.value_dim, dtype=query.dtype)
        for part in self._parts[layer]:
            part.attend(layer, query, out)
        return out

    def paged_spans(self) -> PagedSpans | None:
        kernels = self._attention.kernels
        return None if kernels is None else paged_spans(self._attention, self._batch, kernels)

    @cached_property
    def _parts(self) -> list[list[_Part]]:
        """Of each layer; those of one window have the same."""
        attention = self._attention
        parts = {each: _parts(attention, self._batch, each) for each in set(attention.windows)}
        return [parts[window] for window in attention.windows]

    def _write(self, layer: int, key_value: Tensor) -> None:
        attention = self._attention
        if self._token_rows is None:
            assert attention.kernels is not None
            attention.kernels.write_kv(attention.pool, layer, key_value, self._slots)
            return
        flat = key_value.reshape(-1, attention.tokens.shape[1])
        attention.tokens.index_copy_(0, self._token_rows[layer], flat)


class _Part(Protocol):
    """Some spans of a step."""

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None: ...


def _parts(attention: PagedCpuAttention, batch: Batch, window: int | None) -> list[_Part]:
    return [*_decode_parts(attention, batch, window), *_chunk_parts(attention, batch, window)]


def _decode_parts(
    attention: PagedCpuAttention, batch: Batch, window: int | None
) -> Iterator[_Part]:
    if attention.kernels is not None:
        if batch.num_decodes:
            yield NativeDecodes(attention, batch, attention.kernels, window)
        return
    for first, last in _alike_in_length(batch, attention.layout.block_size, window):
        if window is None:
            yield _Decodes(attention, batch, first, last)
        else:
            yield WindowedDecodes(attention, batch, first, last, window)


def _chunk_parts(attention: PagedCpuAttention, batch: Batch, window: int | None) -> Iterator[_Part]:
    for index in range(batch.num_decodes, len(batch.spans)):
        span, table = batch.spans[index], batch.block_table[index]
        kernels = attention.kernels
        if kernels is not None and kernels.attends_chunks(attention.layout):
            yield NativeChunk(attention, span, table, kernels, window)
        elif window is None:
            yield _Chunk(attention, span, table)
        else:
            yield WindowedChunk(attention, span, table, window=window, rows_at_once=_NUM_QUERY_ROWS)


def _alike_in_length(
    batch: Batch, block_size: int, window: int | None = None
) -> list[tuple[int, int]]:
    """Runs (first, last + 1) of decode spans that are padded to one length.

    Spans come longest first. A run ends where contexts are half as long as its
    longest, if that leaves out enough padding.
    """
    contexts = [span.num_context for span in batch.spans[: batch.num_decodes]]
    if window is not None:
        contexts = [min(context, window + block_size) for context in contexts]
    counts = [-(-context // block_size) for context in contexts]
    starts = [0] if counts else []
    for index, count in enumerate(counts):
        longest = counts[starts[-1]]
        saving = (longest - count) * (len(counts) - index)
        if 2 * count <= longest and saving >= _LEAST_SAVING:
            starts.append(index)
    return list(pairwise([*starts, len(counts)]))


class _Decodes:
    """Spans of one token each, padded to the longest context among them."""

    def __init__(self, attention: PagedCpuAttention, batch: Batch, first: int, last: int) -> None:
        layout = attention.layout
        num_blocks = layout.num_blocks_for(batch.spans[first].num_context)
        self._attention = attention
        self._rows = slice(first, last)
        self._block_rows = attention.block_rows(batch.block_table[first:last, :num_blocks])
        lengths = torch.tensor([span.num_context for span in batch.spans[first:last]])
        later = torch.arange(num_blocks * layout.block_size) >= lengths[:, None]
        mask = torch.zeros(later.shape, dtype=attention.tokens.dtype)
        mask.masked_fill_(later, -math.inf)
        self._mask = mask.repeat_interleave(attention.num_kv_heads, dim=0)[:, None]

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        self._attention.attend_decodes(query, out, self._rows, self._block_rows[layer], self._mask)


class _Chunk:
    """A span of several tokens, attending to its context and causally to itself."""

    def __init__(self, attention: PagedCpuAttention, span: Span, block_table: Tensor) -> None:
        layout = attention.layout
        num_blocks = layout.num_blocks_for(span.num_context)
        self._attention = attention
        self._span = span
        self._block_rows = attention.block_rows(block_table[None, :num_blocks])

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        attention, span = self._attention, self._span
        keys, values = attention.gather(self._block_rows[layer], attention.num_kv_heads)
        end = span.first_row + span.num_tokens
        for first in range(span.first_row, end, _NUM_QUERY_ROWS):
            rows = slice(first, min(end, first + _NUM_QUERY_ROWS))
            num_before = span.num_context - (end - first)
            out[rows] = self._attend_rows(query[rows], keys, values, num_before)

    def _attend_rows(self, query: Tensor, keys: Tensor, values: Tensor, num_before: int) -> Tensor:
        """Consecutive tokens, [rows, heads, head_dim], that ``num_before`` tokens precede."""
        layout = self._attention.layout
        num_rows, num_heads, _ = query.shape
        # Up to the end of the last row's block; what lies behind that row is masked.
        num_keys = layout.num_blocks_for(num_before + num_rows) * layout.block_size
        scores = self._attention.chunk_scores(query, keys[:, :num_keys])
        own = scores.view(num_heads, num_rows, num_keys)[:, :, num_before:]
        own.add_(self._attention.causal[:num_rows, : num_keys - num_before])
        attended = torch.bmm(scores.softmax(dim=-1), values[:, :num_keys])
        return attended.view(num_heads, num_rows, -1).transpose(0, 1)
