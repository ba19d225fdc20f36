"""Owns the blocks of one KV pool: who holds each, and which prefix each caches.

A block is in exactly one state:

1. *free*: nobody's, its content means nothing. ``allocate`` takes it.
2. *referenced*: held by one or more sequences. Full ones may be published.
3. *cached*: held by nobody, but found by its hash. ``retain`` revives it;
   ``allocate`` evicts the one that was left longest ago when no block is free.
4. *quarantined*: its holder is gone, but an operation may still write it. Only
   ``end_quarantine`` frees it, when that operation is proved to be over.

Every operation costs O(1) per block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state; the four sum to the pool's size."""

    free: int
    cached: int
    referenced: int
    quarantined: int


class BlockPool:
    """Hands out block ids ``0 .. num_blocks - 1``. Not thread-safe: one engine owns it."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self._num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._quarantined: set[int] = set()
        self._changes: dict[bytes, bool] | None = None

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can hand out now: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks with one reference each, or None, and no effect, if there are too few.

        Cached blocks are evicted, the longest unused first, when none is free.
        """
        assert num_blocks >= 0
        if num_blocks > self.num_available:
            return None
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def retain(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block, which is referenced or cached."""
        for block_id in block_ids:
            if self._num_references[block_id] == 0:
                assert block_id in self._cached, f"block {block_id} holds nothing to retain"
                del self._cached[block_id]
            self._num_references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drops a reference to each; at none left a block is cached if published, else free.

        Of blocks released together the first will be evicted first: give a
        sequence's blocks last to first, since a prefix is useless without its head.
        """
        for block_id in block_ids:
            assert self._num_references[block_id] > 0, f"block {block_id} is not referenced"
            self._num_references[block_id] -= 1
            if self._num_references[block_id] > 0:
                continue
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def lookup(self, block_hash: bytes) -> int | None:
        """The block that holds these tokens; it stays valid until the next ``allocate``."""
        return self._block_of_hash.get(block_hash)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Lets others find a referenced, full block. Does nothing if another block
        is published under the same hash already."""
        assert self._num_references[block_id] > 0, f"block {block_id} is not referenced"
        if block_hash in self._block_of_hash:
            return
        assert self._hashes[block_id] is None, f"block {block_id} has another content already"
        self._hashes[block_id] = block_hash
        self._block_of_hash[block_hash] = block_id
        if self._changes is not None:
            self._changes[block_hash] = True

    def quarantine(self, block_ids: Iterable[int]) -> None:
        """Turns the only reference to each block into quarantine, and unpublishes it."""
        for block_id in block_ids:
            num_references = self._num_references[block_id]
            assert num_references == 1, f"block {block_id} has {num_references} references"
            self._num_references[block_id] = 0
            self._unpublish(block_id)
            self._quarantined.add(block_id)

    def end_quarantine(self, block_ids: Iterable[int]) -> None:
        """Frees blocks that nothing can write any more."""
        for block_id in block_ids:
            assert block_id in self._quarantined, f"block {block_id} is not quarantined"
            self._quarantined.remove(block_id)
            self._free.append(block_id)

    def watch(self) -> None:
        """From now on ``take_changes`` tells which hashes come and go."""
        self._changes = dict.fromkeys(self._block_of_hash, True)

    def take_changes(self) -> dict[bytes, bool]:
        """The hashes that may have changed since the last call: whether each is published now.

        Nothing unless the pool is watched; the first call tells of all that are.
        """
        if not self._changes:
            return {}
        changes, self._changes = self._changes, {}
        return changes

    def published(self) -> frozenset[bytes]:
        """Every hash that ``lookup`` finds now. O(pool)."""
        return frozenset(self._block_of_hash)

    def counts(self) -> BlockCounts:
        free, cached, quarantined = len(self._free), len(self._cached), len(self._quarantined)
        referenced = self._num_blocks - free - cached - quarantined
        return BlockCounts(free, cached, referenced, quarantined)

    def check(self) -> None:
        """Raises AssertionError unless every block is in exactly one state. O(pool)."""
        referenced = [block for block, count in enumerate(self._num_references) if count]
        states = [*self._free, *self._cached, *referenced, *self._quarantined]
        assert sorted(states) == list(range(self._num_blocks)), "a block is in no or in two states"
        assert self.counts().referenced == len(referenced)
        assert min(self._num_references) >= 0
        published = {hash_: block for block, hash_ in enumerate(self._hashes) if hash_ is not None}
        assert published == self._block_of_hash, "the index and the blocks disagree"
        assert len(published) == self._num_blocks - self._hashes.count(None), "a hash is held twice"
        assert all(self._hashes[block] is not None for block in self._cached)
        assert all(self._hashes[block] is None for block in [*self._free, *self._quarantined])

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._unpublish(block_id)
        return block_id

    def _unpublish(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hashes[block_id] = None
            if self._changes is not None:
                self._changes[block_hash] = False
