"""Decode spans by the CPU kernels: each context is read where it lies, and nothing is gathered.

The sibling of the parts in paged_cpu.py and window.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.batch import Batch
from engine.native.kernels import Kernels

if TYPE_CHECKING:
    from engine.attention.paged_cpu import PagedCpuAttention


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
