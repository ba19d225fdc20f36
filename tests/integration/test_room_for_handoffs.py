"""Invariant 8 of the hand-off: every block that will be received is reserved before the first
is sent, and two pools under pressure cannot deadlock. Room for tokens still to come is taken
as decode goes, above a watermark, with preemption by local recompute.

Nothing fails here, nobody leaves and no lease runs out: with both pools' real workers and
schedulers, each request has its whole answer from its first attempt, in whatever order the
workers and the hand-offs between them get on. Who waits for ever, waits in a deadlock.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.block_world import BLOCK_SIZE, MOST_TOKENS, WATERMARK_BLOCKS, BlockWorld, DecodeSide

from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from engine.sequence import Scheduled, Sequence
from prefill_workers.scheduler import JobState, PrefillJob, PrefillScheduler
from prefill_workers.worker import PrefillWorker

MOST_AT_ONCE = 7
"""Their inputs alone fill each pool two times and more."""
ENDS_WITHIN = 200


class Room:
    """A world in which nothing goes wrong."""

    def __init__(self, **mutants: Any) -> None:
        self.world = BlockWorld(**mutants)
        for side in self.world.decodes:
            self._watch_admission(side)

    def _watch_admission(self, side: DecodeSide) -> None:
        scheduler, pool = side.worker._scheduler, side.kv.pool
        admit = scheduler.admit

        def watched() -> list[DecodeStream]:
            others = scheduler.num_running
            waiting = scheduler.num_waiting
            admitted: list[DecodeStream] = admit()
            if (
                scheduler.num_waiting < waiting
                and others + waiting > 1
                and scheduler.num_running > 1
            ):
                assert pool.num_available >= WATERMARK_BLOCKS, "nothing is left above the watermark"
            return admitted

        scheduler.admit = watched

    def arrive(
        self, num_input: int, num_tokens: int, decode: int, branch: int, common: int
    ) -> None:
        common = min(common, num_input - 1)
        prompt = [*range(common), *[90 + branch] * (num_input - common)]
        num_tokens = min(num_tokens, MOST_TOKENS - num_input)
        self.world.arrive(prompt, num_tokens, decode, local=False)

    def check(self) -> None:
        self.world.check()
        for transfer in self.world.handoff.transfers.values():
            needed = -(-(transfer.num_tokens - transfer.start_token) // BLOCK_SIZE)
            assert len(transfer.target_blocks) == needed, "not all that will come is reserved"
        for job in self.world.prefill.worker._jobs.values():
            if job.state is JobState.RUNNING:
                room = len(job.sequence.block_table) * BLOCK_SIZE
                assert room >= job.sequence.num_tokens, "it was begun without room to its end"
        assert not any(what.startswith("failed") for what in self.world.seen), self.world.seen
        assert all(choice.num_attempts == 1 for choice in self.world.choices)

    def act(self, dice: random.Random) -> None:
        what, moves = dice.random(), self.world.next_moves()
        if what < 0.3 and len(self.world.unfinished) < MOST_AT_ONCE:
            num_input, num_tokens = dice.randint(5, 19), dice.randint(2, 12)
            self.arrive(
                num_input, num_tokens, dice.randrange(2), dice.randrange(9), dice.randrange(9)
            )
        elif what < 0.5 and moves:
            dice.choice(moves)()
        else:
            dice.choice(self.world.sides).round()

    def finish(self) -> Counter[str]:
        for _ in range(ENDS_WITHIN):
            for move in self.world.next_moves():
                move()
            for side in self.world.sides:
                side.round()
            self.check()
            quiet = not (self.world.unfinished or self.world.next_moves())
            if quiet and all(side.worker.idle for side in self.world.sides):
                break
        assert not self.world.unfinished, "a deadlock: somebody waits for ever"
        for side in self.world.sides:
            side.assert_at_rest()
        return self.world.seen


class RoomMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.room = Room()

    @precondition(lambda self: len(self.room.world.unfinished) < MOST_AT_ONCE)
    @rule(
        num_input=st.integers(1, 20),
        num_tokens=st.integers(1, 12),
        decode=st.integers(0, 1),
        branch=st.integers(0, 8),
        common=st.integers(0, 12),
    )
    def arrive(
        self, num_input: int, num_tokens: int, decode: int, branch: int, common: int
    ) -> None:
        self.room.arrive(num_input, num_tokens, decode, branch, common)

    @rule(side=st.integers(0, 2))
    def work(self, side: int) -> None:
        self.room.world.sides[side].round()

    @precondition(lambda self: self.room.world.next_moves())
    @rule(index=st.integers(0, 2**16))
    def move(self, index: int) -> None:
        moves = self.room.world.next_moves()
        moves[index % len(moves)]()

    @invariant()
    def room_is_reserved(self) -> None:
        self.room.check()

    def teardown(self) -> None:
        self.room.finish()


# Without Phase.shrink, which takes minutes here; add it for the shortest schedule that fails.
RoomMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
test_any_order_of_two_full_pools_ends_without_deadlock_and_in_reserved_room = RoomMachine.TestCase


def random_walks(num_walks: int, **mutants: Any) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(num_walks):
        dice, room = random.Random(seed), Room(**mutants)
        for _ in range(dice.randrange(20, 100)):
            room.act(dice)
            room.check()
        seen += room.finish()
    return seen


def test_random_schedules_preempt_and_hand_over() -> None:
    seen = random_walks(150)
    assert min(seen[what] for what in ("answers", "hand-offs", "preemptions")) > 50, seen


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_thousands_of_schedules() -> None:
    random_walks(4000)


# ------------------------------------------------------------------------------ mutants


class ReservesTheFirstBlock(DecodeScheduler):
    """Reserves room for a received input as it comes."""

    def _take_blocks(self, sequence: Sequence) -> bool:
        self._kv.hold_prefix(sequence)
        return self._kv.ensure_blocks(sequence, len(sequence.block_table) * BLOCK_SIZE + 1)


class BeginsWithoutRoom(PrefillScheduler):
    """Takes blocks for an input as it is computed."""

    def _admit(self) -> list[PrefillJob]:
        admitted = []
        while self._queued and len(self._running) < self._max_running:
            job = self._queued.popitem(last=False)[1]
            self._kv.hold_prefix(job.sequence)
            job.state = JobState.RUNNING
            self._running[job.key] = job
            admitted.append(job)
        return admitted

    def schedule(self) -> tuple[list[Scheduled], list[PrefillJob]]:
        chunks, grown = super().schedule()
        ends = [(chunk, chunk.seq.num_computed_tokens + chunk.num_tokens) for chunk in chunks]
        return [c for c, end in ends if self._kv.ensure_blocks(c.seq, end)], grown


class NeverPreempts(DecodeScheduler):
    """Who has no room for his next token waits for it, holding what he has."""

    def _make_room(self, stream: DecodeStream) -> None:
        self._kv.ensure_blocks(stream.sequence, stream.sequence.num_tokens)

    def schedule(self) -> list[Scheduled]:
        def has_room(chunk: Scheduled) -> bool:
            end = chunk.seq.num_computed_tokens + chunk.num_tokens
            return len(chunk.seq.block_table) * BLOCK_SIZE >= end

        return [chunk for chunk in super().schedule() if has_room(chunk)]


class HasNoWatermark(DecodeScheduler):
    def __init__(self, *args: Any, **limits: Any) -> None:
        super().__init__(*args, **limits | {"watermark_blocks": 0})


class BeginsAtOpen(PrefillWorker):
    """Computes first, and looks for room at decode then."""

    def open(self, job: PrefillJob) -> None:
        super().open(job)
        self.proceed(job.key, 0)

    def proceed(self, key: StreamKey, num_held_tokens: int) -> None:
        super().proceed(key, num_held_tokens)


class HoldsWhileItWaits(DecodeScheduler):
    """Who does not get all his blocks keeps those that he got."""

    def _take_blocks(self, sequence: Sequence) -> bool:
        if not sequence.block_table:
            self._kv.hold_prefix(sequence)
        while len(sequence.block_table) * BLOCK_SIZE < sequence.num_tokens:
            num_tokens = len(sequence.block_table) * BLOCK_SIZE + 1
            if not self._kv.ensure_blocks(sequence, num_tokens):
                return False
        return True


MUTANTS: list[tuple[str, Any, str]] = [
    ("decode_scheduler", ReservesTheFirstBlock, "not all that will come is reserved"),
    ("decode_scheduler", NeverPreempts, "a deadlock"),
    ("decode_scheduler", HasNoWatermark, "nothing is left above the watermark"),
    ("decode_scheduler", HoldsWhileItWaits, "nothing is left above the watermark"),
    ("prefill_scheduler", BeginsWithoutRoom, "begun without room to its end"),
    ("prefill", BeginsAtOpen, "prefill began before decode had reserved"),
]


@pytest.mark.parametrize(
    ("part", "mutant", "violated"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS]
)
def test_each_mutant_is_killed(part: str, mutant: Any, violated: str) -> None:
    with pytest.raises(AssertionError, match=violated):
        random_walks(200, **{part: mutant})


def test_pool_without_preemption_does_deadlock() -> None:
    with pytest.raises(AssertionError, match="a deadlock"):
        random_walks(60, decode_scheduler=NeverPreempts)
