"""What is moved: two models' KV shapes, so many tokens of so many requests, in scattered blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from baton.config import KvTransferConfig
from baton.kv_layout import KvLayout
from benchmarks.handoff.shapes import BLOCK_SIZE

TOKENS = (1024, 4096, 16384)
REQUESTS = (1, 16)
PREFILL_CORE, COPY_CORE = 0, 1
"""All of the prefill process, and what copies in the decode process: the thread of a transport or
of memcpy. The decode process' event loop runs where there is room."""
TRANSFER = KvTransferConfig(lease_s=120.0, operation_s=60.0)
"""Bounds that a slow machine does not meet; the rest is what workers have."""


@dataclass(frozen=True, slots=True)
class Load:
    """``requests`` hand-offs of ``tokens`` each, ``at_once`` of them together."""

    tokens: int
    requests: int
    at_once: int

    @property
    def blocks_each(self) -> int:
        return -(-self.tokens // BLOCK_SIZE)

    def waves(self) -> Iterator[int]:
        """How many requests go together, one wave after the other."""
        for first in range(0, self.requests, self.at_once):
            yield min(self.at_once, self.requests - first)


def load_in(layout: KvLayout, tokens: int, requests: int) -> Load:
    """As many at once as the pool has blocks for. Raises ValueError where there is not room
    for one."""
    fit = layout.num_blocks // layout.num_blocks_for(tokens)
    if fit == 0:
        raise ValueError(
            f"{tokens} tokens need {layout.num_blocks_for(tokens)} blocks, the pool has "
            f"{layout.num_blocks}; ask for larger pools"
        )
    return Load(tokens, requests, min(requests, fit))


class FreeList:
    """A pool's blocks in the order in which one that was used for long gives them out: none.

    Who takes blocks leaves the list turned, so the next ones are others, and in no cache.
    """

    def __init__(self, layout: KvLayout, seed: int) -> None:
        self._ids = np.random.default_rng(seed).permutation(layout.num_blocks)

    def take(self, load: Load, requests: int) -> list[list[int]]:
        """Those of each of a wave's requests."""
        each = load.blocks_each
        ids = self.peek(each * requests)
        self._ids = np.roll(self._ids, -len(ids))
        return [ids[number * each : (number + 1) * each] for number in range(requests)]

    def peek(self, number: int) -> list[int]:
        """The next blocks, which stay."""
        return [int(block) for block in self._ids[:number]]
