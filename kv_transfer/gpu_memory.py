"""A worker's KV memory on a GPU, as hand-offs see it: an engine has made it, and writes it.

What is announced of it is complete: an engine's step returns when the GPU has done all of it
(``engine/gpu/steps.py``), so no transport has to know of the engine's streams.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton.kv_layout import KvLayout
from kv_transfer.blocks import CheckedBlocks
from kv_transfer.memory import KvMemory


class GpuMemory:
    """``buffer``: uint8, contiguous, on one GPU; kept alive by this."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.num_bytes = buffer.numel()

    @property
    def fd(self) -> None:
        """No file that others could map."""
        return None

    @property
    def address(self) -> int:
        return self.buffer.data_ptr()

    @property
    def device(self) -> int:
        """This process's number of the GPU."""
        return self.buffer.device.index or 0

    def seal(self) -> None:
        """Nobody maps it but over ``cuda_ipc``, which knows no reading alone: peers keep to it."""

    def close(self) -> None:
        """It lives as long as its last user."""


def pool_memory(
    num_bytes: int, *, on_gpu: Callable[[], torch.Tensor | None], sealed: bool
) -> KvMemory | GpuMemory:
    """A worker's pool: what ``on_gpu`` makes, or where that is nothing ``num_bytes`` of the host.

    Raises ConfigurationError where there is too little memory.
    """
    pool = on_gpu()
    return KvMemory(num_bytes, sealed=sealed) if pool is None else GpuMemory(pool)


class GpuBlocks(CheckedBlocks):
    """A pool of a GPU's memory, by its checksums: the bytes come to the host for them."""

    def __init__(self, layout: KvLayout, memory: GpuMemory) -> None:
        self.layout = layout
        rows = layout.num_kv_heads * layout.num_layers * layout.num_kv_parts
        size = layout.num_bytes
        shape = (layout.num_blocks + 1, rows, layout.block_size, -1)
        self._rows = memory.buffer[:size].view(*shape)

    def valid_bytes(self, block: int, num_tokens: int) -> memoryview:
        valid: memoryview = self._rows[block, :, :num_tokens].cpu().contiguous().numpy().data
        return valid
