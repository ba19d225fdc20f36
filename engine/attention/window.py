"""Sliding windows over the paged pool: only the blocks that a window reaches are gathered.

The siblings of the parts in paged_cpu.py, for layers whose tokens attend to the last
``window`` tokens alone, themselves included::

    | block | block | block | block |        gathered: from the block with the first
            . . . # # # # # #                visible token on; what lies before or
                  window  query              behind is masked
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import Batch, Span

if TYPE_CHECKING:
    from engine.attention.paged_cpu import PagedCpuAttention


class WindowedDecodes:
    """Spans ``first`` to ``last`` (not included), of one token each, in one product."""

    def __init__(
        self, attention: PagedCpuAttention, batch: Batch, first: int, last: int, window: int
    ) -> None:
        layout = attention.layout
        lengths = torch.tensor([span.num_context for span in batch.spans[first:last]])[:, None]
        first_blocks = (lengths - window).clamp(min=0) // layout.block_size
        last_blocks = (lengths - 1) // layout.block_size
        width = int((last_blocks - first_blocks).max()) + 1
        columns = first_blocks + torch.arange(width)
        # Behind its last block a span reads that block again, masked.
        table = batch.block_table[first:last].gather(1, columns.minimum(last_blocks))
        positions = first_blocks * layout.block_size + torch.arange(width * layout.block_size)
        mask = _mask((positions < lengths) & (positions >= lengths - window), attention.dtype)
        self._attention = attention
        self._rows = slice(first, last)
        self._block_rows = attention.block_rows(table)
        self._mask = mask.repeat_interleave(attention.num_kv_heads, dim=0)[:, None]

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        self._attention.attend_decodes(query, out, self._rows, self._block_rows[layer], self._mask)


class WindowedChunk:
    """A span of several tokens, computed ``rows_at_once`` query tokens a product."""

    def __init__(
        self,
        attention: PagedCpuAttention,
        span: Span,
        block_table: Tensor,
        *,
        window: int,
        rows_at_once: int,
    ) -> None:
        layout = attention.layout
        size = layout.block_size
        start = span.num_context - span.num_tokens  # position of the first row
        first_block = max(0, start + 1 - window) // size
        last_block = layout.num_blocks_for(span.num_context)
        self._attention = attention
        self._block_rows = attention.block_rows(block_table[None, first_block:last_block])
        self._products: list[tuple[slice, slice, Tensor]] = []
        for first in range(0, span.num_tokens, rows_at_once):
            end = min(span.num_tokens, first + rows_at_once)
            low = max(0, start + first + 1 - window) // size * size
            high = layout.num_blocks_for(start + end) * size
            keys = torch.arange(low, high)
            queries = torch.arange(start + first, start + end)[:, None]
            mask = _mask((keys <= queries) & (keys > queries - window), attention.dtype)
            offset = first_block * size
            rows = slice(span.first_row + first, span.first_row + end)
            self._products.append((rows, slice(low - offset, high - offset), mask))

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        attention = self._attention
        keys, values = attention.gather(self._block_rows[layer], attention.num_kv_heads)
        for rows, visible, mask in self._products:
            scores = attention.chunk_scores(query[rows], keys[:, visible])
            scores.view(-1, *mask.shape).add_(mask)
            attended = torch.bmm(scores.softmax(dim=-1), values[:, visible])
            out[rows] = attended.view(query.shape[1], -1, out.shape[2]).transpose(0, 1)


def _mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)
