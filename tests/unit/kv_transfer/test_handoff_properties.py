"""Both machines of the hand-off against each other, over a channel that misbehaves.

The invariants are DESIGN's 2 (every byte once and right), 3 (late, repeated and
reordered messages are harmless), 5 (everything ends in time) and 7 (only what
was needed moves). Each is shown to bite by a mutant that breaks it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_transfer import receiver as rx
from kv_transfer import sender as tx
from kv_transfer.ranges import BlockRange
from tests.support.handoff_model import World


def walk(world: World, choices: list[int]) -> None:
    for choice in choices:
        world.act(choice)
    world.settle()


@given(
    choices=st.lists(st.integers(0, 2**16), min_size=50, max_size=200),
    two_sided=st.booleans(),
    verify=st.booleans(),
)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_handoff_keeps_its_invariants_under_any_schedule(
    choices: list[int], two_sided: bool, verify: bool
) -> None:
    walk(World(two_sided=two_sided, verify=verify), choices)


NUM_WALKS = 3000
"""The same for every mutant as for the code itself, which all of them leave well."""


def random_walks(num_walks: int, **mutants: Any) -> int:
    """How many transfers became ready; raises AssertionError where an invariant broke."""
    num_ready = 0
    for seed in range(num_walks):
        dice = random.Random(seed)
        world = World(two_sided=bool(seed % 2), verify=bool(seed // 2 % 2), **mutants)
        walk(world, [dice.randrange(2**16) for _ in range(dice.randrange(10, 120))])
        num_ready += world.num_ready
    return num_ready


def test_random_schedules_do_lead_to_ready() -> None:
    assert random_walks(NUM_WALKS) > 200


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_hundred_thousand_schedules() -> None:
    random_walks(100_000)


class ReadyWithoutRelease(rx.ReceiveTransfer):
    """Trusts its own copy."""

    def _release_when_copied(self, now: float) -> list[rx.ReceiverEffect]:
        effects = super()._release_when_copied(now)
        if self.state is rx.ReceiverState.COMMITTING:
            effects += self.released(now, ok=True)
        return effects


class AcceptsRepeatedReady(rx.ReceiveTransfer):
    def announced(self, now: float, blocks: BlockRange) -> list[rx.ReceiverEffect]:
        if self.state is rx.ReceiverState.RECEIVING and blocks not in self._copying:
            self._announced_end = blocks.start_token
        return super().announced(now, blocks)


class AcceptsReadyWithGap(rx.ReceiveTransfer):
    def announced(self, now: float, blocks: BlockRange) -> list[rx.ReceiverEffect]:
        self._announced_end = max(self._announced_end, blocks.start_token)
        return super().announced(now, blocks)

    def copy_ended(self, now: float, blocks: BlockRange, *error: Any) -> list[rx.ReceiverEffect]:
        self._copied_tokens = blocks.start_token - self._start_token
        return super().copy_ended(now, blocks, *error)


class ReleasesBeforeTheCopyEnds(rx.ReceiveTransfer):
    def _release_when_copied(self, now: float) -> list[rx.ReceiverEffect]:
        if self._announced_end == self._num_tokens:
            self._copied_tokens = self._num_tokens - self._start_token
        return super()._release_when_copied(now)


class DrainsWhileCopying(rx.ReceiveTransfer):
    def cannot_stop(self) -> list[rx.ReceiverEffect]:
        effects = super().cannot_stop()
        return [*effects, rx.Drained()] if effects else []


class TrustsAnExpiredLease(rx.ReceiveTransfer):
    """Gives the sender's answer some more time than its own view of the lease."""

    def released(self, now: float, *, ok: bool) -> list[rx.ReceiverEffect]:
        return super().released(min(now, self._lease_until - 0.1), ok=ok)

    def tick(self, now: float) -> list[rx.ReceiverEffect]:
        late = self.state is rx.ReceiverState.COMMITTING
        return super().tick(now - 3.0 if late else now)


class WaitsForReleasedForEver(rx.ReceiveTransfer):
    @property
    def deadline(self) -> float | None:
        return None if self.state is rx.ReceiverState.COMMITTING else super().deadline


class CountsHeldTokens(rx.ReceiveTransfer):
    @property
    def num_bytes(self) -> int:
        return self._num_tokens * self._sizes.token_bytes


class KeepsTheSenderOfAHeldPrompt(rx.ReceiveTransfer):
    """Where nothing has to move, it goes on at once and releases nobody."""

    def _release_when_copied(self, now: float) -> list[rx.ReceiverEffect]:
        effects = super()._release_when_copied(now)
        if self.num_bytes == 0 and self.state is rx.ReceiverState.COMMITTING:
            return self.released(now, ok=True)
        return effects


class MovesTheHeldPrefixToo(rx.ReceiveTransfer):
    """Copies what it has, from the block before."""

    def announced(self, now: float, blocks: BlockRange) -> list[rx.ReceiverEffect]:
        effects = super().announced(now, blocks)
        size = self._sizes.block_size
        if blocks.start_token != self._start_token or not self._start_token:
            return effects
        held = BlockRange(0, size, blocks.source_blocks[:1], (0,))
        self._copying.add(held)
        return [*effects, rx.StartCopy(held)]


class LetsAStaleCommitThrough(rx.ReceiveTransfer):
    """Takes the last of several Released, whatever state it is in."""

    def released(self, now: float, *, ok: bool) -> list[rx.ReceiverEffect]:
        if ok and self.state is rx.ReceiverState.READY:
            self.state = rx.ReceiverState.COMMITTING
        return super().released(now, ok=ok)


class AcknowledgesAfterExpiry(tx.SendTransfer):
    """Forgets renewals, and then that it has freed the blocks."""

    def renew(self, now: float, lease_s: float) -> list[tx.SenderEffect]:
        return []

    def _expire_if_due(self, now: float) -> list[tx.SenderEffect]:
        effects = super()._expire_if_due(now)
        return [effect for effect in effects if not isinstance(effect, tx.SendAborted)]

    def release(self, now: float, num_bytes: int) -> list[tx.SenderEffect]:
        effects = super().release(now, num_bytes)
        return [tx.SendReleased(True) if e == tx.SendReleased(False) else e for e in effects]


class FreesWhileSending(tx.SendTransfer):
    def _end(self, *args: Any) -> list[tx.SenderEffect]:
        self._operations, operations = 0, self._operations
        effects = super()._end(*args)
        self._operations = operations
        return effects


class AnnouncesTooEarly(tx.SendTransfer):
    def ready(self, end_token: int, block_ids: Any) -> list[tx.SenderEffect]:
        size = self._sizes.block_size
        return super().ready(min(self._num_tokens, -(-end_token // size) * size), block_ids)


class NeverExpires(tx.SendTransfer):
    @property
    def deadline(self) -> float | None:
        return None


class FreesTwice(tx.SendTransfer):
    def release(self, now: float, num_bytes: int) -> list[tx.SenderEffect]:
        if self.state is tx.SenderState.FREED and self.outcome == "released":
            self.state = tx.SenderState.LEASED
            self._lease_until = now + 1.0
        return super().release(now, num_bytes)


class FillerPassesForData(tx.SendTransfer):
    """Acknowledges a copy of which it sent zeros."""

    def fetch(self, now: float, start_token: int, end_token: int) -> list[tx.SenderEffect]:
        effects = super().fetch(now, start_token, end_token)
        if any(isinstance(e, tx.StartSend) for e in effects):
            self._operations -= 1
            return [tx.StartFiller(start_token, end_token)]
        return effects


UNACKNOWLEDGED = "ready without the sender's acknowledgement"
WRITTEN = "READY while a copy writes the blocks"
VIOLATED: dict[type[rx.ReceiveTransfer] | type[tx.SendTransfer], str] = {
    ReadyWithoutRelease: UNACKNOWLEDGED,
    AcceptsRepeatedReady: "a range is copied once",
    AcceptsReadyWithGap: WRITTEN,
    ReleasesBeforeTheCopyEnds: WRITTEN,
    DrainsWhileCopying: "drained while a copy writes the blocks",
    TrustsAnExpiredLease: "ready under a lease that ran out",
    WaitsForReleasedForEver: "COMMITTING",
    CountsHeldTokens: "needed minus held, exactly",
    KeepsTheSenderOfAHeldPrompt: UNACKNOWLEDGED,
    MovesTheHeldPrefixToo: "moved what was held",
    LetsAStaleCommitThrough: "ready twice",
    AcknowledgesAfterExpiry: UNACKNOWLEDGED,
    FreesWhileSending: "freed while a send reads the blocks",
    AnnouncesTooEarly: "announced before it was computed",
    NeverExpires: "LEASED",
    FreesTwice: "freed twice",
    FillerPassesForData: "ready with bytes that the source does not have",
}
"""What each mutant is killed by: the model's word for it, or an assertion of the machine's own."""


@pytest.mark.parametrize(
    ("mutant", "violated"), VIOLATED.items(), ids=[each.__name__ for each in VIOLATED]
)
def test_mutant_is_killed(
    mutant: type[rx.ReceiveTransfer] | type[tx.SendTransfer], violated: str
) -> None:
    side = "receiver_class" if issubclass(mutant, rx.ReceiveTransfer) else "sender_class"
    with pytest.raises(AssertionError, match=violated):
        random_walks(NUM_WALKS, **{side: mutant})
