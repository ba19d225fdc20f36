"""A run of tokens and the blocks that hold it: what one Ready announces and one copy moves.

Every range starts at the first token of a block. Only the range that ends the
input may end inside one, so no block is ever moved in two pieces::

    tokens   16 ........ 31 | 32 ........ 47 | 48 .. 52
    blocks   source 7       | source 2       | source 9 (5 valid tokens)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Tokens ``[start_token, end_token)`` of a transfer's input."""

    start_token: int
    end_token: int
    source_blocks: tuple[int, ...]
    """In the prefill worker's pool, one per block that the tokens touch."""
    blocks: tuple[int, ...] = ()
    """In the decode worker's pool, matching ``source_blocks``; the sender knows none."""
    checksums: tuple[int, ...] = ()
    """CRC-32 of each block's valid bytes; empty where nobody verifies."""

    @property
    def num_tokens(self) -> int:
        return self.end_token - self.start_token

    def parts(self, num_blocks: int, block_size: int) -> Iterator[BlockRange]:
        """The range in pieces of at most ``num_blocks`` blocks, in their order."""
        for first in range(0, len(self.source_blocks), num_blocks):
            here = slice(first, first + num_blocks)
            start_token = self.start_token + first * block_size
            yield BlockRange(
                start_token,
                min(self.end_token, start_token + num_blocks * block_size),
                self.source_blocks[here],
                self.blocks[here],
                self.checksums[here],
            )


def valid_tokens(start_token: int, end_token: int, block_size: int) -> list[int]:
    """How many tokens of the range lie in each of its blocks: all full but maybe the last."""
    return [
        min(block_size, end_token - token) for token in range(start_token, end_token, block_size)
    ]
