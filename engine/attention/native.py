"""Spans by the CPU kernels: each context is read where it lies, and nothing is gathered.

The sibling of the parts in paged_cpu.py and window.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import Batch, Span
from engine.native.kernels import Kernels
from engine.native.layers import ChunkSpan, PagedSpans

if TYPE_CHECKING:
    from engine.attention.paged_cpu import PagedCpuAttention


def paged_spans(attention: PagedCpuAttention, batch: Batch, kernels: Kernels) -> PagedSpans | None:
    """All of a step; None where it has chunks that the kernels do not take."""
    num_decodes = batch.num_decodes
    if num_decodes < len(batch.spans) and not kernels.attends_chunks(attention.layout):
        return None
    return PagedSpans(
        pool=attention.pool,
        scale=attention.scale,
        slots=batch.slot_mapping,
        block_table=batch.block_table[:num_decodes],
        contexts=_contexts(batch),
        chunks=tuple(
            ChunkSpan(span.first_row, span.num_tokens, span.num_context - span.num_tokens, table)
            for span, table in zip(
                batch.spans[num_decodes:], batch.block_table[num_decodes:], strict=True
            )
        ),
    )


def _contexts(batch: Batch) -> Tensor:
    lengths = [span.num_context for span in batch.spans[: batch.num_decodes]]
    return torch.tensor(lengths, dtype=torch.int32)


class NativeChunk:
    """One span of several tokens."""

    def __init__(
        self,
        attention: PagedCpuAttention,
        span: Span,
        block_table: Tensor,
        kernels: Kernels,
        window: int | None,
    ) -> None:
        self._attention = attention
        self._kernels = kernels
        self._window = window
        self._rows = slice(span.first_row, span.first_row + span.num_tokens)
        self._num_before = span.num_context - span.num_tokens
        self._block_table = block_table

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        self._kernels.attend_chunk(
            self._attention.pool,
            layer,
            query[self._rows],
            out[self._rows],
            block_table=self._block_table,
            num_before=self._num_before,
            scale=self._attention.scale,
            window=self._window,
        )


class NativeDecodes:
    """The decode spans of a step, ``window`` being how far they see; None for all."""

    def __init__(
        self, attention: PagedCpuAttention, batch: Batch, kernels: Kernels, window: int | None
    ) -> None:
        self._attention = attention
        self._kernels = kernels
        self._window = window
        self._contexts = _contexts(batch)
        self._block_table = batch.block_table[: batch.num_decodes]

    def attend(self, layer: int, query: Tensor, out: Tensor) -> None:
        self._kernels.attend_decodes(
            self._attention.pool,
            layer,
            query,
            out,
            block_table=self._block_table,
            contexts=self._contexts,
            scale=self._attention.scale,
            window=self._window,
        )
