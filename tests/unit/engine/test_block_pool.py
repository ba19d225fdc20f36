"""The block pool: four states, one at a time, under any sequence of calls."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv_cache.block_pool import BlockCounts, BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Holds a model of who refers to what, and checks the pool against it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.pool.watch()
        self.told: set[bytes] = set()
        self.held: Counter[int] = Counter()
        self.quarantined: set[int] = set()
        self.hash_of: dict[int, bytes] = {}

    @rule(num_blocks=st.integers(0, 7))
    def allocate(self, num_blocks: int) -> None:
        available = 6 - len(+self.held) - len(self.quarantined)
        block_ids = self.pool.allocate(num_blocks)
        assert (block_ids is None) == (num_blocks > available)
        for block_id in block_ids or []:
            assert not self.held[block_id], "a block in use was handed out"
            assert block_id not in self.quarantined, "a quarantined block was handed out"
            self.held[block_id] += 1
            self.hash_of.pop(block_id, None)
        assert len(set(block_ids or [])) == len(block_ids or [])

    @precondition(lambda self: self.hash_of)
    @rule(data=st.data())
    def look_up_and_retain(self, data: st.DataObject) -> None:
        block_id, block_hash = data.draw(st.sampled_from(sorted(self.hash_of.items())))
        assert self.pool.lookup(block_hash) == block_id
        self.pool.retain([block_id])
        self.held[block_id] += 1

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(+self.held)))
        self.pool.release([block_id])
        self.held[block_id] -= 1

    @precondition(lambda self: +self.held)
    @rule(data=st.data(), name=st.integers(0, 3))
    def publish(self, data: st.DataObject, name: int) -> None:
        block_id = data.draw(st.sampled_from(sorted(+self.held)))
        block_hash = bytes([name])
        if block_id in self.hash_of and block_hash not in self.hash_of.values():
            return  # a block never changes its content while somebody holds it
        self.pool.publish(block_id, block_hash)
        if block_hash not in self.hash_of.values():
            self.hash_of[block_id] = block_hash

    @precondition(lambda self: 1 in self.held.values())
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        alone = sorted(block_id for block_id, count in self.held.items() if count == 1)
        block_id = data.draw(st.sampled_from(alone))
        self.pool.quarantine([block_id])
        del self.held[block_id]
        self.hash_of.pop(block_id, None)
        self.quarantined.add(block_id)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def end_quarantine(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(sorted(self.quarantined)))
        self.pool.end_quarantine([block_id])
        self.quarantined.remove(block_id)

    @rule()
    def take_changes(self) -> None:
        for block_hash, is_published in self.pool.take_changes().items():
            (self.told.add if is_published else self.told.discard)(block_hash)
        assert self.told == self.pool.published() == set(self.hash_of.values())

    @invariant()
    def states_agree(self) -> None:
        self.pool.check()
        held = set(+self.held)
        num_cached = len(set(self.hash_of) - held)
        num_free = 6 - len(held) - num_cached - len(self.quarantined)
        expected = BlockCounts(num_free, num_cached, len(held), len(self.quarantined))
        assert self.pool.counts() == expected
        for name in range(4):
            known = [block for block, hash_ in self.hash_of.items() if hash_ == bytes([name])]
            assert self.pool.lookup(bytes([name])) == (known[0] if known else None)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_sequence_of_calls_keeps_every_block_in_one_state = PoolMachine.TestCase


def test_allocate_takes_free_blocks_before_it_evicts() -> None:
    pool = BlockPool(3)
    cached = pool.allocate(1)
    assert cached is not None
    pool.publish(cached[0], b"a")
    pool.release(cached)
    assert pool.allocate(2) is not None
    assert pool.lookup(b"a") == cached[0]


def test_the_longest_unused_cached_block_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block_id, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block_id, name)
    pool.release(blocks)
    pool.retain([blocks[0]])
    pool.release([blocks[0]])
    assert pool.allocate(2) == [blocks[1], blocks[2]]
    assert pool.lookup(b"a") == blocks[0]


def test_a_refused_allocation_evicts_nothing() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    pool.release([blocks[0]])
    before = pool.counts()
    assert pool.allocate(2) is None
    assert pool.counts() == before
    assert pool.lookup(b"a") == blocks[0]


def test_a_duplicate_of_a_published_block_becomes_free_when_released() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block_id in blocks:
        pool.publish(block_id, b"same")
    pool.release(blocks)
    assert pool.counts() == BlockCounts(free=1, cached=1, referenced=0, quarantined=0)
    assert pool.lookup(b"same") == blocks[0]


def test_quarantine_hides_a_published_block_until_it_ends() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    pool.quarantine(blocks)
    assert pool.lookup(b"a") is None
    assert pool.allocate(1) is None
    pool.end_quarantine(blocks)
    assert pool.counts() == BlockCounts(free=1, cached=0, referenced=0, quarantined=0)


def test_watching_tells_of_what_is_published_already() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"a")
    assert pool.take_changes() == {}
    pool.watch()
    assert pool.take_changes() == {b"a": True}
    assert pool.take_changes() == {}
    pool.release(blocks)
    assert pool.take_changes() == {}
    assert pool.allocate(1) == blocks
    assert pool.take_changes() == {b"a": False}


def test_misuse_is_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.retain(blocks)
    with pytest.raises(AssertionError, match="2 references"):
        pool.quarantine(blocks)
    pool.release([*blocks, *blocks])
    for call in (pool.release, pool.retain, pool.quarantine, pool.end_quarantine):
        with pytest.raises(AssertionError):
            call(blocks)
    with pytest.raises(AssertionError):
        pool.publish(blocks[0], b"a")


def test_check_notices_a_block_in_two_states() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool._free.append(blocks[0])
    with pytest.raises(AssertionError, match="no or in two states"):
        pool.check()
