"""The prefill side's machine, state by state, with a clock of numbers."""

from __future__ import annotations

from typing import Any

import pytest

from baton.errors import DeadlineExceededError, LeaseExpiredError, TransferError
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange
from kv_transfer.sender import (
    ComputeChecksums,
    Freed,
    SendAborted,
    SendCommit,
    SenderSizes,
    SenderState,
    SendReady,
    SendReleased,
    SendTransfer,
    StartFiller,
    StartSend,
)

KEY = TransferKey(b"t", 0, b"p", b"d")
BLOCKS = [40, 41, 42]
NUM_BYTES = 6 * 10  # tokens 4..9 at 10 bytes each


def transfer(*, verify: bool = False) -> SendTransfer:
    """Ten tokens in blocks of four, of which decode holds the first four."""
    sizes = SenderSizes(block_size=4, token_bytes=10, attach_s=7.0, verify=verify)
    return SendTransfer(KEY, start_token=4, num_tokens=10, sizes=sizes)


def leased(*, attached: bool = True) -> SendTransfer:
    machine = transfer()
    if attached:
        machine.attach(0.0, 4, 6.0)
    machine.ready(10, BLOCKS)
    machine.commit(0.0, 77, 0)
    assert machine.state is SenderState.LEASED
    return machine


def error_of(effects: list[Any]) -> Exception:
    (told,) = [effect.error for effect in effects if isinstance(effect, SendAborted)]
    assert isinstance(told, Exception)
    return told


def test_only_full_blocks_are_announced_until_the_last_token() -> None:
    machine = transfer()
    machine.attach(0.0, 4, 6.0)
    assert machine.ready(3, BLOCKS[:1]) == []
    assert machine.ready(7, BLOCKS[:2]) == []
    assert machine.ready(9, BLOCKS) == [SendReady(BlockRange(4, 8, (41,)))]
    assert machine.ready(9, BLOCKS) == []
    assert machine.ready(10, BLOCKS) == [SendReady(BlockRange(8, 10, (42,)))]


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_ready_at_once_is_announced_in_pieces(verify: bool) -> None:
    """A cached prefix of any length: each piece is copied within the bound on an operation."""
    sizes = SenderSizes(4, 10, 7.0, verify, announced_bytes=2 * 4 * 10)
    machine = SendTransfer(KEY, start_token=4, num_tokens=18, sizes=sizes)
    machine.attach(0.0, 4, 6.0)
    pieces = [BlockRange(4, 12, (41, 42)), BlockRange(12, 18, (43, 44))]
    effect = ComputeChecksums if verify else SendReady
    assert machine.ready(18, [40, 41, 42, 43, 44]) == [effect(piece) for piece in pieces]


def test_late_attach_hears_everything_that_is_ready() -> None:
    machine = transfer()
    machine.ready(8, BLOCKS)
    machine.ready(10, BLOCKS)
    machine.commit(0.0, 77, 3)
    assert machine.attach(1.0, 4, 6.0) == [
        SendReady(BlockRange(4, 8, (41,))),
        SendReady(BlockRange(8, 10, (42,))),
        SendCommit(10, 77, 3),
    ]


def test_commit_waits_for_checksums_and_the_blocks_for_their_readers() -> None:
    machine = transfer(verify=True)
    machine.attach(0.0, 4, 6.0)
    blocks = BlockRange(4, 10, (41, 42))
    assert machine.ready(10, BLOCKS) == [ComputeChecksums(blocks)]
    assert machine.commit(0.0, 77, 0) == []
    assert machine.checksummed(blocks, [5, 6]) == [
        SendReady(BlockRange(4, 10, (41, 42), checksums=(5, 6))),
        SendCommit(10, 77, 0),
    ]
    draining = transfer(verify=True)
    draining.ready(10, BLOCKS)
    assert draining.abort(TransferError("no")) == []
    assert draining.state is SenderState.DRAINING
    assert draining.checksummed(blocks, [5, 6]) == [Freed("aborted", 0)]


def test_release_under_the_lease_hands_over_and_frees() -> None:
    machine = leased()
    assert machine.release(5.9, NUM_BYTES) == [
        SendReleased(ok=True),
        Freed("released", NUM_BYTES),
    ]
    assert machine.state is SenderState.FREED
    assert machine.release(5.9, NUM_BYTES) == [], "a repeated Release does nothing"


def test_release_after_the_lease_is_not_acknowledged() -> None:
    effects = leased().release(6.0, NUM_BYTES)
    assert isinstance(error_of(effects), LeaseExpiredError)
    assert Freed("lease_expired", 0) in effects
    assert SendReleased(ok=False) in effects


def test_release_of_another_number_of_bytes_is_not_acknowledged() -> None:
    effects = leased().release(1.0, NUM_BYTES - 10)
    assert "50 bytes were received, 60 were offered" in str(error_of(effects))
    assert effects[1:] == [Freed("aborted", 0), SendReleased(ok=False)]


def test_release_before_commit_does_nothing() -> None:
    machine = transfer()
    machine.attach(0.0, 4, 6.0)
    assert machine.release(1.0, NUM_BYTES) == []
    assert machine.state is SenderState.COMPUTING


def test_renewed_lease_is_never_shortened() -> None:
    machine = leased()
    assert machine.deadline == 6.0
    machine.renew(1.0, 9.0)
    assert machine.deadline == 10.0
    machine.renew(2.0, 1.0)
    assert machine.deadline == 10.0
    assert machine.tick(9.9) == []
    assert Freed("lease_expired", 0) in machine.tick(10.0)


def test_renew_after_expiry_revives_nothing() -> None:
    machine = leased()
    assert Freed("lease_expired", 0) in machine.renew(6.0, 9.0)
    assert machine.renew(6.1, 9.0) == []
    assert machine.state is SenderState.FREED


def test_commit_that_nobody_attached_to_is_kept_for_attach_s() -> None:
    machine = leased(attached=False)
    assert machine.deadline == 7.0
    assert machine.tick(7.0) == [Freed("lease_expired", 0)]
    assert isinstance(error_of(machine.attach(8.0, 4, 6.0)), LeaseExpiredError)
    on_time = leased(attached=False)
    on_time.attach(6.9, 4, 6.0)
    assert on_time.deadline == 12.9


def test_attach_at_the_moment_of_expiry_frees_once() -> None:
    machine = leased(attached=False)
    effects = machine.attach(7.0, 4, 6.0)
    assert effects[0] == Freed("lease_expired", 0)
    assert isinstance(error_of(effects), LeaseExpiredError)


def test_repeated_attach_does_nothing() -> None:
    machine = leased()
    assert machine.attach(1.0, 0, 99.0) == []
    assert machine.deadline == 6.0


def test_attach_with_another_start_aborts() -> None:
    machine = transfer()
    effects = machine.attach(0.0, 0, 6.0)
    assert "4 tokens" in str(error_of(effects))
    assert effects[-1] == Freed("aborted", 0)


@pytest.mark.parametrize("make", [transfer, leased])
def test_abort_tells_an_attached_peer(make: Any) -> None:
    machine = make()
    machine.attach(0.0, 4, 6.0)
    effects = machine.abort(DeadlineExceededError("too late"))
    assert isinstance(error_of(effects), DeadlineExceededError)
    assert effects[-1] == Freed("aborted", 0)
    assert machine.abort(DeadlineExceededError("again")) == []


def test_abandon_and_loss_free_only_what_was_attached() -> None:
    for end, outcome in (("abandon", "abandoned"), ("peer_lost", "peer_lost")):
        machine = transfer()
        assert getattr(machine, end)() == []
        machine.attach(0.0, 4, 6.0)
        assert getattr(machine, end)() == [Freed(outcome, 0)]  # type: ignore[arg-type]
        assert getattr(machine, end)() == []


def test_worker_may_go_on_after_the_peer_is_lost() -> None:
    machine = transfer()
    machine.attach(0.0, 4, 6.0)
    machine.peer_lost()
    assert machine.ready(10, BLOCKS) == []
    assert machine.commit(1.0, 77, 0) == []
    assert machine.abort(TransferError("no")) == []


def test_blocks_are_not_freed_while_they_are_sent() -> None:
    machine = leased()
    assert machine.fetch(1.0, 4, 10) == [StartSend(BlockRange(4, 10, (41, 42)))]
    assert machine.release(2.0, NUM_BYTES) == [SendReleased(ok=True)]
    assert machine.state is SenderState.DRAINING
    assert machine.operation_ended() == [Freed("released", NUM_BYTES)]
    lost = leased()
    lost.fetch(1.0, 4, 10)
    assert lost.peer_lost() == []
    assert lost.operation_ended(TransferError("closed")) == [Freed("peer_lost", 0)]


def test_failed_send_aborts() -> None:
    machine = leased()
    machine.fetch(1.0, 4, 10)
    effects = machine.operation_ended(TransferError("reset"))
    assert str(error_of(effects)) == "reset"
    assert effects[-1] == Freed("aborted", 0)


def test_fetch_that_comes_too_late_is_answered_by_filler() -> None:
    machine = leased()
    effects = machine.fetch(6.0, 4, 10)
    assert Freed("lease_expired", 0) in effects
    assert effects[-1] == StartFiller(4, 10)
    assert machine.fetch(6.1, 4, 10) == [], "and only once"


def test_fetch_of_what_was_never_announced_ends_the_transfer() -> None:
    machine = transfer()
    machine.attach(0.0, 4, 6.0)
    effects = machine.fetch(0.0, 4, 8)
    assert "never announced" in str(error_of(effects))
    assert effects[-2:] == [Freed("aborted", 0), StartFiller(4, 8)]


def test_nothing_to_move_is_committed_and_released_all_the_same() -> None:
    sizes = SenderSizes(block_size=4, token_bytes=10, attach_s=7.0, verify=True)
    machine = SendTransfer(KEY, start_token=8, num_tokens=8, sizes=sizes)
    machine.attach(0.0, 8, 6.0)
    assert machine.ready(8, BLOCKS[:2]) == []
    assert machine.commit(0.0, 77, 0) == [SendCommit(8, 77, 0)]
    assert machine.release(1.0, 0) == [SendReleased(ok=True), Freed("released", 0)]
