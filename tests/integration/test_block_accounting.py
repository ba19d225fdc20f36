"""Blocks of both pools under random schedules of arrivals, cancels, preemptions, prefix hits,
hand-offs that end in any way, and further attempts on the same pool or another, also while the
one before still quarantines: each block is in one state, each reference is somebody's, nobody
computes from KV that is not his, and at rest nothing is held.

A mutant for each of these shows that it would be noticed.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.block_world import BlockWorld

from baton.errors import BatonError
from decode_workers.lends import Lends
from decode_workers.scheduler import DecodeStream
from decode_workers.worker import DecodeWorker
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sequence
from kv_transfer.keys import TransferKey
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import JobState, PrefillJob
from prefill_workers.worker import PrefillWorker

DECODE = st.integers(0, 1)
ANY = st.integers(0, 2**16)


class BlockMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = BlockWorld()

    def choice(self, index: int) -> Any:
        return self.world.unfinished[index % len(self.world.unfinished)]

    @precondition(lambda self: len(self.world.unfinished) < 6)
    @rule(
        num_common=st.integers(0, 3),
        branch=st.integers(0, 2),
        num_own=st.integers(1, 4),
        num_tokens=st.integers(1, 8),
        decode=DECODE,
        local=st.booleans(),
    )
    def arrive(
        self,
        num_common: int,
        branch: int,
        num_own: int,
        num_tokens: int,
        decode: int,
        local: bool,
    ) -> None:
        """``num_common`` blocks of a prompt are those of others."""
        prompt = [*range(4 * num_common), *[90 + branch] * num_own]
        self.world.arrive(prompt, num_tokens, decode, local=local)

    @rule(side=st.integers(0, 2), rounds=st.integers(1, 4))
    def work(self, side: int, rounds: int) -> None:
        for _ in range(rounds):
            self.world.sides[side].round()

    @precondition(lambda self: self.world.next_moves())
    @rule()
    def move_on(self) -> None:
        for move in self.world.next_moves():
            move()

    @precondition(lambda self: self.world.moves())
    @rule(index=ANY)
    def move_anyhow(self, index: int) -> None:
        moves = self.world.moves()
        moves[index % len(moves)]()

    @precondition(lambda self: self.world.unfinished)
    @rule(index=ANY, decode=DECODE, local=st.booleans())
    def attempt(self, index: int, decode: int, local: bool) -> None:
        self.world.attempt(self.choice(index), decode, local=local)

    @precondition(lambda self: self.world.unfinished)
    @rule(index=ANY)
    def cancel(self, index: int) -> None:
        self.world.cancel(self.choice(index))

    @precondition(lambda self: self.world.unfinished)
    @rule(index=ANY)
    def expire(self, index: int) -> None:
        self.world.expire(self.choice(index))

    @rule()
    def forget(self) -> None:
        self.world.prefill.forget()

    @rule(side=st.integers(0, 2))
    def lose_session(self, side: int) -> None:
        self.world.lose_session(self.world.sides[side])

    @rule(side=st.integers(0, 2))
    def fail_all(self, side: int) -> None:
        self.world.fail_all(self.world.sides[side])

    @invariant()
    def books_are_right(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()


# Without Phase.shrink, which takes minutes here; add it for the shortest schedule that fails.
BlockMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
test_any_schedule_keeps_every_block_in_one_state_and_ends_at_rest = BlockMachine.TestCase


def random_walks(num_walks: int, **mutants: Any) -> Counter[str]:
    """What was seen; raises AssertionError where an invariant broke."""
    seen: Counter[str] = Counter()
    for seed in range(num_walks):
        dice, world = random.Random(seed), BlockWorld(**mutants)
        for _ in range(dice.randrange(40, 160)):
            world.act_at_random(dice)
            world.check()
        world.settle()
        seen += world.seen
    return seen


def test_random_schedules_see_all_that_they_are_about() -> None:
    seen = random_walks(150)
    wanted = (
        *("answers", "hand-offs", "preemptions", "prefix hits", "late writes"),
        *("attempts while blocks are quarantined", "failed: transfer_failed"),
        *("failed: deadline_exceeded", "failed: draining", "pulls", "late pulls"),
    )
    assert min(seen[what] for what in wanted) >= 10, seen


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_thousands_of_schedules() -> None:
    random_walks(4000)


class FreesWhatMayBeWritten(KvCache):
    def quarantine(self, seq: Sequence, num_tokens: int | None = None) -> list[int]:
        self.free(seq)
        return []


class KeepsSharedBlocks(KvCache):
    def free(self, seq: Sequence) -> None:
        num_shared = seq.num_shared_tokens // self.layout.block_size
        self.pool.release(reversed(seq.block_table[num_shared:]))
        self._forget_blocks(seq)


class PublishesBeforeItIsReceived(KvCache):
    def ensure_blocks(self, seq: Sequence, num_tokens: int) -> bool:
        done = super().ensure_blocks(seq, num_tokens)
        if done and seq.num_computed_tokens == seq.num_shared_tokens:
            self.publish_first(seq)
        return done

    def publish_first(self, seq: Sequence) -> None:
        computed, seq.num_computed_tokens = seq.num_computed_tokens, seq.num_tokens
        self.publish(seq)
        seq.num_computed_tokens = computed


class FreesWhatIsRead(PrefillWorker):
    def _end(self, job: PrefillJob, error: BatonError) -> None:
        super()._end(job, error)
        self._engine.kv.free(job.sequence)


class ForgetsADrain(DecodeWorker):
    def _end(self, stream: DecodeStream, *, cancel_transfer: bool = True) -> None:
        super()._end(stream, cancel_transfer=cancel_transfer)
        if not cancel_transfer and stream.transfer is not None:
            self._quarantined.pop(stream.transfer, None)


class FreesWhatAPullMayWrite(Pulls):
    def _abandon(self, transfer: TransferKey) -> None:
        self._kv.free(self._pulls.pop(transfer).job.sequence)


class ForgetsThatAJobPulls(Pulls):
    def cancel(self, job: PrefillJob) -> None:
        self._pulls.pop(job.transfer.way_back, None)


class ComputesWhileItPulls(Pulls):
    def begin(self, job: PrefillJob) -> None:
        super().begin(job)
        job.state = JobState.RUNNING


class ComputesIntoASharedBlock(KvCache):
    def adopt_prefix(self, seq: Sequence, num_tokens: int) -> None:
        super().adopt_prefix(seq, num_tokens)
        seq.num_shared_tokens = 0


class LendsWithoutHolding(Lends):
    def asked(self, lend: TransferKey, start_token: int) -> None:
        super().asked(lend, start_token)
        if blocks := self._lent.get(lend):
            self._kv.pool.release(reversed(blocks))
            self._lent[lend] = []


class KeepsWhatWasLent(Lends):
    def over(self, lend: TransferKey) -> None:
        del self._lent[lend]


MUTANTS: list[tuple[str, Any, str]] = [
    ("kv", FreesWhatMayBeWritten, "another may get it"),
    ("kv", KeepsSharedBlocks, "a block is held by nobody"),
    ("kv", PublishesBeforeItIsReceived, "a cached block is not what it is named"),
    ("prefill", FreesWhatIsRead, "blocks that are read were given back"),
    ("decode", ForgetsADrain, "nobody waits for their drain"),
    ("pulls", FreesWhatAPullMayWrite, "another may get it"),
    ("pulls", ForgetsThatAJobPulls, "another may get it"),
    ("pulls", ComputesWhileItPulls, "shared before it was received"),
    ("kv", ComputesIntoASharedBlock, "a shared block is written"),
    ("lends", LendsWithoutHolding, "blocks that are read were given back"),
    ("lends", KeepsWhatWasLent, "a block is held by nobody"),
]


@pytest.mark.parametrize(
    ("part", "mutant", "violated"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS]
)
def test_each_mutant_is_noticed(part: str, mutant: Any, violated: str) -> None:
    with pytest.raises(AssertionError, match=violated):
        random_walks(40, **{part: mutant})
