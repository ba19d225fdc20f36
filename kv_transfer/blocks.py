"""Blocks of a KV pool of the host as arrays of 64-bit words: copying and checksumming them.

Words of 8 bytes, because copying is faster with them than byte by byte; all
operations release the GIL. A whole block is one run of bytes. Of a block that
is filled in part, only the valid tokens are touched::

    block [kv_head][layer][part][token][dim]
          every (kv_head, layer, part) is a row; the first num_tokens of each row move
"""

from __future__ import annotations

import mmap
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import TransferCorruptError
from baton.kv_layout import KvLayout
from kv_transfer.ranges import BlockRange, valid_tokens

Words = npt.NDArray[Any]
CopyBlocks = Callable[[Words, Words, Sequence[int], Sequence[int]], None]
"""Copies rows of the second array, those of the second list, to those of the first. Raises
IndexError where there is no such row."""


def copy_each_block(
    target: Words, source: Words, blocks: Sequence[int], source_blocks: Sequence[int]
) -> None:
    """A CopyBlocks that lets go of the GIL for each block, and takes it again."""
    for block, source_block in zip(blocks, source_blocks, strict=True):
        target[block] = source[source_block]


class CheckedBlocks(ABC):
    """A pool's blocks by their checksums, wherever it lies."""

    layout: KvLayout

    @abstractmethod
    def valid_bytes(self, block: int, num_tokens: int) -> memoryview:
        """Of the first ``num_tokens`` tokens of a block, in the layout's order, contiguous."""

    def verify(self, block: int, num_tokens: int, checksum: int) -> None:
        """Raises TransferCorruptError unless the valid bytes have this checksum."""
        found = self.checksum(block, num_tokens)
        if found != checksum:
            raise TransferCorruptError(
                f"block {block} arrived with checksum {found:#010x}, it was {checksum:#010x}"
            )

    def verify_all(self, blocks: BlockRange) -> None:
        """``verify`` of each block that the range was copied to, if it has checksums."""
        if not blocks.checksums:
            return
        counts = valid_tokens(blocks.start_token, blocks.end_token, self.layout.block_size)
        for block, num_tokens, checksum in zip(
            blocks.blocks, counts, blocks.checksums, strict=True
        ):
            self.verify(block, num_tokens, checksum)

    def checksum(self, block: int, num_tokens: int) -> int:
        """CRC-32 of the valid bytes of a block, in the layout's order."""
        return zlib.crc32(self.valid_bytes(block, num_tokens))


class PoolView(CheckedBlocks):
    """One worker's pool, its own or a peer's mapped for reading.

    Args:
        layout: of that pool; peers' pools may have other numbers of blocks.
        memory: at least ``layout.num_bytes``; kept alive by this view.
        copy_blocks: copies whole blocks into this pool; by default one after the other.
    """

    def __init__(
        self,
        layout: KvLayout,
        memory: memoryview | mmap.mmap,
        *,
        copy_blocks: CopyBlocks | None = None,
    ) -> None:
        self.layout = layout
        self._copy_blocks = copy_blocks or copy_each_block
        row_bytes = layout.head_dim * layout.item_bytes
        kind = np.int64 if row_bytes % 8 == 0 else np.uint8
        words = np.frombuffer(memory, dtype=kind, count=layout.num_bytes // kind().itemsize)
        rows = layout.num_kv_heads * layout.num_layers * layout.num_kv_parts
        self._blocks = words.reshape(layout.num_blocks + 1, -1)
        self._rows = words.reshape(layout.num_blocks + 1, rows, layout.block_size, -1)

    def copy_range(self, source: PoolView, blocks: BlockRange) -> None:
        """Copies the valid tokens of all blocks of the range. Raises IndexError where either
        pool has no such block."""
        num_whole, num_left = divmod(blocks.num_tokens, self.layout.block_size)
        self._copy_blocks(
            *(self._blocks, source._blocks),
            *(blocks.blocks[:num_whole], blocks.source_blocks[:num_whole]),
        )
        if num_left:
            self.copy_from(source, blocks.source_blocks[-1], blocks.blocks[-1], num_left)

    def copy_from(self, source: PoolView, source_block: int, block: int, num_tokens: int) -> None:
        """Copies the first ``num_tokens`` tokens of one block of ``source``.

        Raises IndexError where either pool has no such block.
        """
        if num_tokens == self.layout.block_size:
            self._blocks[block] = source._blocks[source_block]
        else:
            self._rows[block, :, :num_tokens] = source._rows[source_block, :, :num_tokens]

    def valid_bytes(self, block: int, num_tokens: int) -> memoryview:
        valid: memoryview
        if num_tokens == self.layout.block_size:
            valid = self._blocks[block].data
        else:
            valid = np.ascontiguousarray(self._rows[block, :, :num_tokens]).data
        return valid
