"""The KV index against a model: gaps, restarts, replays, and what is only expected."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.v1 import session_pb2 as pb
from baton.worker.cache_feed import CacheFeed
from router.routing.kv_index import ASK_AGAIN_S, EXPECT_S, KvIndex

NUM_BLOCKS = 4
EPOCH, OTHER = b"e" * 16, b"o" * 16


def name(number: int) -> bytes:
    return bytes([number]) * 16


NAMES = st.integers(0, 9).map(name)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class IndexMachine(RuleBasedStateMachine):
    """One worker's cache, its Session, and a gateway's index of it.

    ``wire`` holds what is under way; ``missed`` says that something of it was dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.index = KvIndex(self.clock)
        self.truth: set[bytes] = set()
        self.wire: list[pb.CacheEvents] = []
        self.delivered: list[pb.CacheEvents] = []
        self.asked = False
        self.missed = False
        self.expected: dict[bytes, float] = {}
        self.start_session()

    def start_session(self) -> None:
        self.feed = CacheFeed(lambda _, message: self.wire.append(message.cache_events))
        self.feed.change(dict.fromkeys(self.truth, True))
        self.wire, self.delivered = [], []
        self.asked = self.missed = False
        self.index.forget(EPOCH)
        self.index.join(EPOCH, num_blocks=NUM_BLOCKS)
        self.expected = {}
        self.feed.join(1)

    @rule(changes=st.dictionaries(NAMES, st.booleans(), max_size=5))
    def cache_changes(self, changes: dict[bytes, bool]) -> None:
        after = (self.truth | {h for h, held in changes.items() if held}) - {
            h for h, held in changes.items() if not held
        }
        if len(after) <= NUM_BLOCKS:
            self.truth = after
            self.feed.change(changes)

    @precondition(lambda self: self.wire)
    @rule()
    def deliver(self) -> None:
        events = self.wire.pop(0)
        self.delivered.append(events)
        if self.index.take(EPOCH, events):
            assert self.missed, "a snapshot was asked for without a gap"
            self.asked = True

    @precondition(lambda self: self.wire)
    @rule()
    def drop(self) -> None:
        self.wire.pop(0)
        self.missed = True

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        assert not self.index.take(EPOCH, data.draw(st.sampled_from(self.delivered)))

    @precondition(lambda self: self.asked)
    @rule()
    def answer(self) -> None:
        self.asked = False
        self.feed.join(1)

    @rule()
    def restart(self) -> None:
        self.truth = set()
        self.start_session()

    @rule()
    def reconnect(self) -> None:
        self.start_session()

    @rule(names=st.lists(NAMES, max_size=3, unique=True))
    def expect(self, names: list[bytes]) -> None:
        self.index.expect(EPOCH, names)
        for hash_ in names:
            self.expected[hash_] = self.clock.now + EXPECT_S

    @rule(seconds=st.sampled_from([0.5, ASK_AGAIN_S, EXPECT_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def come_to_rest(self) -> None:
        """However much was dropped, the index finds to the truth."""
        for _ in range(4):
            while self.wire:
                self.deliver()
            if self.asked:
                self.answer()
                continue
            self.clock.now += ASK_AGAIN_S
            some = next(iter(self.truth), name(9))  # the next change, whatever it is
            for is_held in (some not in self.truth, some in self.truth):
                self.feed.change({some: is_held})
        while self.wire:
            self.deliver()
        self.clock.now += EXPECT_S
        assert self.index.num_indexed_blocks(EPOCH) == len(self.truth)
        for number in range(10):
            held = self.index.num_held_blocks(EPOCH, [name(number)])
            assert held == (name(number) in self.truth)

    @invariant()
    def never_over_its_bound(self) -> None:
        part = self.index._parts[EPOCH]
        assert len(part.held) <= NUM_BLOCKS
        assert len(part.expected) <= NUM_BLOCKS

    @invariant()
    def one_walk_finds_what_the_parts_hold(self) -> None:
        part = self.index._parts[EPOCH]
        assert set(self.index._held.bits) == part.held
        assert set(self.index._expected.bits) == set(part.expected)

    @invariant()
    def nothing_is_held_that_was_never_told(self) -> None:
        told = {e.added[at : at + 16] for e in self.delivered for at in range(0, len(e.added), 16)}
        alive = {hash_ for hash_, until in self.expected.items() if until > self.clock.now}
        for number in range(10):
            if self.index.num_held_blocks(EPOCH, [name(number)]):
                assert name(number) in told | alive


IndexMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_index_follows_its_worker_through_gaps_restarts_and_replays = IndexMachine.TestCase


def events(sequence: int, *added: bytes, snapshot: bool = False) -> pb.CacheEvents:
    return pb.CacheEvents(sequence=sequence, snapshot=snapshot, added=b"".join(added))


def joined(clock: Clock, *held: bytes) -> KvIndex:
    index = KvIndex(clock)
    index.join(EPOCH, num_blocks=NUM_BLOCKS)
    assert not index.take(EPOCH, events(1, *held, snapshot=True))
    return index


def test_only_leading_blocks_count() -> None:
    index = joined(Clock(), name(1), name(2), name(4))
    assert index.num_held_blocks(EPOCH, [name(n) for n in (1, 2, 3, 4)]) == 2
    assert index.num_held_blocks(EPOCH, [name(1), name(2)]) == 2
    assert index.num_held_blocks(EPOCH, []) == 0
    assert index.num_held_blocks(OTHER, [name(1)]) == 0


def test_a_gap_empties_the_part_and_asks_once_in_a_while() -> None:
    clock = Clock()
    index = joined(clock, name(1))
    assert index.take(EPOCH, events(3, name(2)))
    assert index.num_held_blocks(EPOCH, [name(1)]) == 0
    assert not index.take(EPOCH, events(4, name(3)))
    clock.now += ASK_AGAIN_S
    assert index.take(EPOCH, events(5, name(3)))
    assert not index.take(EPOCH, events(6, name(5), snapshot=True))
    assert index.num_held_blocks(EPOCH, [name(5)]) == 1


def test_a_worker_that_tells_of_more_than_its_blocks_is_not_believed() -> None:
    index = joined(Clock(), *map(name, range(NUM_BLOCKS)))
    assert index.take(EPOCH, events(2, name(9)))
    assert index.num_indexed_blocks(EPOCH) == 0


def test_what_a_decision_leads_to_is_believed_for_a_while() -> None:
    clock = Clock()
    index = joined(clock, name(1))
    index.expect(EPOCH, [name(1), name(2)])
    assert index.num_held_blocks(EPOCH, [name(1), name(2)]) == 2
    clock.now += EXPECT_S
    assert index.num_held_blocks(EPOCH, [name(1), name(2)]) == 1


def test_a_lost_worker_is_forgotten_at_once() -> None:
    index = joined(Clock(), name(1))
    index.forget(EPOCH)
    index.forget(EPOCH)
    assert index.num_held_blocks(EPOCH, [name(1)]) == 0
    assert not index.take(EPOCH, events(2, name(1)))
    index.expect(EPOCH, [name(1)])
    assert index.num_indexed_blocks(EPOCH) == 0


def test_one_walk_tells_of_every_worker() -> None:
    third = b"t" * 16
    index = joined(Clock(), name(1), name(2), name(3))
    for epoch, held in ((OTHER, (1,)), (third, (2, 3))):
        index.join(epoch, num_blocks=NUM_BLOCKS)
        index.take(epoch, events(1, *map(name, held), snapshot=True))
    index.expect(OTHER, [name(2)])
    chain, lost = [name(n) for n in (1, 2, 3)], b"l" * 16
    counts = index.leading_blocks([EPOCH, OTHER, third, lost], chain)
    assert counts == {EPOCH: 3, OTHER: 2, third: 0, lost: 0}
    index.forget(EPOCH)
    index.join(lost, num_blocks=NUM_BLOCKS)  # it takes over what was the other's place
    assert index.leading_blocks([EPOCH, lost], chain) == {EPOCH: 0, lost: 0}
    assert index.indexed_blocks(third) == {name(2), name(3)}
    assert index.indexed_blocks(lost) == frozenset()
