"""Spans by the CPU kernels: each context is read where it lies, and nothing is gathered.

The sibling of the parts in paged_cpu.py and window.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import Batch, Span
from engine.native.kernels import Kernels

if TYPE_CHECKING:
    from engine.attention.paged_cpu import PagedCpuAttention


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
        spans = batch.spans[: batch.num_decodes]
        self._attention = attention
        self._kernels = kernels
        self._window = window
        self._contexts = torch.tensor([span.num_context for span in spans], dtype=torch.int32)
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
