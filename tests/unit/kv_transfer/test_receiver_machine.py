"""The decode side's machine, state by state, with a clock of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from baton.errors import LeaseExpiredError, TransferError
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange
from kv_transfer.receiver import (
    BecameReady,
    Drained,
    Failed,
    Quarantined,
    ReceiverSizes,
    ReceiverState,
    ReceiveTransfer,
    SendAbandon,
    SendAttach,
    SendRelease,
    SendRenew,
    StartCopy,
    StopCopies,
)

KEY = TransferKey(b"t", 0, b"p", b"d")
SIZES = ReceiverSizes(block_size=4, token_bytes=10, attach_s=7.0, lease_s=6.0, operation_s=5.0)
FIRST = BlockRange(4, 8, (41,), (1,))
LAST = BlockRange(8, 10, (42,), (2,))


def announced(copy: BlockRange) -> BlockRange:
    return BlockRange(copy.start_token, copy.end_token, copy.source_blocks)


def reserved() -> ReceiveTransfer:
    """Ten tokens in blocks of four, the first four of them held, into blocks 1 and 2."""
    machine = ReceiveTransfer(KEY, start_token=4, num_tokens=10, sizes=SIZES)
    assert machine.state is ReceiverState.QUEUED
    assert machine.reserve(0.0, [1, 2]) == []
    return machine


def receiving() -> ReceiveTransfer:
    machine = reserved()
    assert machine.attach(0.0) == [SendAttach(4, 6000)]
    return machine


def copying() -> ReceiveTransfer:
    machine = receiving()
    assert machine.announced(0.0, announced(FIRST)) == [StartCopy(FIRST)]
    return machine


def committing() -> ReceiveTransfer:
    machine = copying()
    assert machine.announced(0.0, announced(LAST)) == [StartCopy(LAST)]
    assert machine.copy_ended(0.0, FIRST) == []
    assert machine.committed(0.0, 10, 77, 3) == []
    assert machine.copy_ended(1.0, LAST) == [SendRelease(60)]
    assert machine.state is ReceiverState.COMMITTING
    return machine


def failure(effects: list[Any]) -> Exception:
    (error,) = [effect.error for effect in effects if isinstance(effect, Failed)]
    assert isinstance(error, Exception)
    return error


def test_ready_follows_release_acknowledged_under_the_lease() -> None:
    machine = committing()
    assert machine.released(5.9, ok=True) == [BecameReady(77, 3, 6)]
    assert machine.state is ReceiverState.READY
    assert machine.released(5.9, ok=True) == []
    assert machine.cancel(6.0) == []
    assert machine.deadline is None


def test_commit_may_come_after_the_last_byte() -> None:
    machine = copying()
    machine.announced(0.0, announced(LAST))
    machine.copy_ended(0.0, LAST)
    assert machine.copy_ended(0.0, FIRST) == []
    assert machine.committed(1.0, 10, 77, 3) == [SendRelease(60)]


def test_nothing_missing_is_released_at_commit() -> None:
    machine = ReceiveTransfer(KEY, start_token=8, num_tokens=8, sizes=SIZES)
    machine.reserve(0.0, [])
    machine.attach(0.0)
    assert machine.committed(1.0, 8, 77, 0) == [SendRelease(0)]
    assert machine.released(1.5, ok=True) == [BecameReady(77, 0, 0)]


# -------------------------------------------------------------- each state's failure


@pytest.mark.parametrize("make", [reserved, receiving, copying, committing])
def test_cancel_in_every_state_drains_when_no_copy_writes(make: Any) -> None:
    machine = make()
    effects = machine.cancel(1.0)
    assert (SendAbandon() in effects) == (make is not reserved)
    assert not any(isinstance(effect, Failed) for effect in effects)
    if make is copying:
        assert machine.state is ReceiverState.CANCELLING
        assert effects[-1] == StopCopies()
        assert machine.copy_ended(1.1, FIRST) == [Drained()]
    else:
        assert effects[-1] == Drained()
    assert machine.state is ReceiverState.FREED
    assert machine.cancel(1.2) == []


def test_reserved_fails_when_no_stream_comes_up() -> None:
    machine = reserved()
    assert machine.deadline == 7.0
    machine.not_connected("refused")
    assert machine.tick(6.9) == []
    effects = machine.tick(7.0)
    assert "no connection to the sender in 7 s: refused" in str(failure(effects))
    assert effects[-1] == Drained()
    assert machine.attach(7.1) == []


@pytest.mark.parametrize("make", [receiving, copying, committing])
def test_lost_stream_fails_what_was_attached(make: Any) -> None:
    machine = make()
    effects = machine.peer_lost(1.0, TransferError("gone"))
    assert str(failure(effects)) == "gone"
    assert SendAbandon() not in effects
    assert machine.released(1.1, ok=True) == []


def test_lost_stream_leaves_what_waits_for_the_next_one() -> None:
    machine = reserved()
    assert machine.peer_lost(1.0, TransferError("gone")) == []
    assert machine.state is ReceiverState.RESERVED


@pytest.mark.parametrize("make", [receiving, copying, committing])
def test_abort_of_the_sender_fails(make: Any) -> None:
    effects = make().aborted(1.0, TransferError("given up"))
    assert str(failure(effects)) == "given up"
    assert SendAbandon() not in effects


def test_failed_copy_fails_and_waits_for_the_others() -> None:
    machine = copying()
    machine.announced(0.0, announced(LAST))
    effects = machine.copy_ended(1.0, FIRST, TransferError("fault"))
    assert effects[0] == SendAbandon()
    assert effects[-1] == StopCopies()
    assert machine.copy_ended(1.1, LAST, TransferError("stopped")) == [Drained()]


def test_refused_release_discards_the_copy() -> None:
    effects = committing().released(2.0, ok=False)
    assert isinstance(failure(effects), LeaseExpiredError)
    assert effects[-1] == Drained()


def test_acknowledgement_after_the_lease_discards_the_copy() -> None:
    effects = committing().released(6.0, ok=True)
    assert isinstance(failure(effects), LeaseExpiredError)


def test_committing_ends_with_the_lease_and_renews_it_no_more() -> None:
    machine = committing()
    assert machine.deadline == 6.0
    assert machine.tick(3.0) == []
    effects = machine.tick(6.0)
    assert isinstance(failure(effects), LeaseExpiredError)
    assert SendAbandon() in effects


def test_receiving_renews_every_third_of_the_lease() -> None:
    machine = receiving()
    assert machine.deadline == 2.0
    assert machine.tick(1.9) == []
    assert machine.tick(2.0) == [SendRenew(6000)]
    assert machine.deadline == 4.0
    assert machine.tick(4.5) == [SendRenew(6000)]


def test_receiver_that_slept_through_its_lease_fails() -> None:
    effects = copying().tick(6.0)
    assert isinstance(failure(effects), LeaseExpiredError)
    assert effects[-1] == StopCopies()


def test_copy_that_ends_after_the_lease_is_not_released() -> None:
    machine = copying()
    machine.announced(0.0, announced(LAST))
    machine.committed(0.0, 10, 77, 3)
    machine.copy_ended(1.0, FIRST)
    effects = machine.copy_ended(6.0, LAST)
    assert isinstance(failure(effects), LeaseExpiredError)
    assert effects[-1] == Drained()


def test_commit_without_progress_fails_after_operation_s() -> None:
    machine = copying()
    machine.committed(1.0, 10, 77, 3)
    machine.tick(2.0)
    machine.tick(4.0)
    assert machine.deadline == 6.0
    effects = machine.tick(6.0)
    assert "no byte of it moved in 5 s" in str(failure(effects))
    assert machine.state is ReceiverState.CANCELLING


def test_copies_before_its_own_are_progress() -> None:
    machine = copying()
    machine.committed(1.0, 10, 77, 3)
    machine.tick(2.0)
    machine.tick(4.0)
    machine.copy_before_ended(5.5)
    assert machine.tick(6.0) == [SendRenew(6000)]
    assert "no byte of it moved" in str(failure(machine.tick(10.5)))


def test_copy_that_does_not_end_is_quarantined_until_it_does() -> None:
    machine = copying()
    machine.cancel(1.0)
    assert machine.deadline == 6.0
    assert machine.tick(6.0) == [Quarantined()]
    assert machine.state is ReceiverState.QUARANTINED
    assert machine.tick(100.0) == []
    assert machine.deadline is None
    assert machine.copy_ended(200.0, FIRST) == [Drained()]
    assert machine.state is ReceiverState.FREED


def test_copy_that_cannot_be_stopped_is_quarantined_at_once() -> None:
    machine = copying()
    assert machine.cannot_stop() == []
    machine.cancel(1.0)
    assert machine.cannot_stop() == [Quarantined()]
    assert machine.cannot_stop() == []


# ------------------------------------------------------------ messages that do not fit


def test_repeated_and_reordered_ready_copy_nothing() -> None:
    machine = receiving()
    assert machine.announced(0.0, announced(LAST)) == []
    machine.announced(0.0, announced(FIRST))
    assert machine.announced(0.0, announced(FIRST)) == []
    assert machine.announced(0.0, announced(LAST)) == [StartCopy(LAST)]


@pytest.mark.parametrize(
    "wrong",
    [
        BlockRange(4, 12, (41, 42)),
        BlockRange(4, 6, (41,)),
        BlockRange(4, 4, ()),
        BlockRange(4, 8, (41, 42)),
        BlockRange(4, 8, (41,), checksums=(1, 2)),
    ],
    ids=["past-the-end", "inside-a-block", "empty", "blocks", "checksums"],
)
def test_malformed_ready_fails(wrong: BlockRange) -> None:
    effects = receiving().announced(0.0, wrong)
    assert isinstance(failure(effects), TransferError)
    assert SendAbandon() in effects


def test_commit_of_another_length_fails() -> None:
    assert "11 input tokens" in str(failure(receiving().committed(0.0, 11, 77, 0)))


def test_repeated_commit_keeps_the_first_token() -> None:
    machine = copying()
    machine.announced(0.0, announced(LAST))
    machine.committed(0.0, 10, 77, 3)
    assert machine.committed(0.5, 10, 78, 4) == []
    machine.copy_ended(0.5, FIRST)
    machine.copy_ended(0.5, LAST)
    assert machine.released(0.6, ok=True) == [BecameReady(77, 3, 6)]


@pytest.mark.parametrize("make", [reserved, receiving, copying])
def test_released_before_release_does_nothing(make: Any) -> None:
    machine = make()
    before = machine.state
    assert machine.released(0.5, ok=True) == []
    assert machine.released(0.5, ok=False) == []
    assert machine.state is before


def test_ended_transfer_ignores_every_message() -> None:
    machine = receiving()
    machine.cancel(1.0)
    assert machine.announced(1.0, announced(FIRST)) == []
    assert machine.committed(1.0, 10, 77, 0) == []
    assert machine.released(1.0, ok=True) == []
    assert machine.aborted(1.0, TransferError("late")) == []
    assert machine.peer_lost(1.0, TransferError("late")) == []
    assert machine.attach(1.0) == []
    assert machine.fail(1.0, TransferError("late")) == []
    assert machine.tick(99.0) == []
