"""What a gateway believes of other gateways' decisions, and for how long."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from baton.protocol import new_epoch
from router.routing.peer_ledger import (
    EXPIRE_S,
    MAX_BATCH,
    MAX_PER_WORKER,
    MAX_TRANSIT_S,
    Announcement,
    Decision,
    PeerLedger,
    announce,
    decisions_of,
)
from router.routing.policy import PeerShare

WORKER, OTHER = new_epoch(), new_epoch()
NOTHING = PeerShare()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.known = {WORKER, OTHER}
        self.ledger = PeerLedger(self.clock, lambda epoch: epoch in self.known)

    def add(self, decided_at: float, *, epoch: bytes = WORKER, num_tokens: int = 10) -> None:
        self.ledger.add([Decision(epoch, decided_at, num_tokens, num_blocks=1)])


def heard(
    decision: Decision, *, sent_at: float, wall_at_sender: float, wall_here: float, here: float
) -> Decision:
    """The decision as it is after its way through a message."""
    message = announce([decision], sender="s", gateway_id="g", now=sent_at, wall=wall_at_sender)
    (received,) = decisions_of(Announcement.model_validate_json(message), now=here, wall=wall_here)
    return received


def test_only_what_was_decided_after_the_report_is_counted() -> None:
    rig = Rig()
    rig.add(999.0, num_tokens=1)
    rig.add(999.5, num_tokens=10)
    rig.add(999.9, num_tokens=100)
    rig.add(999.9, epoch=OTHER, num_tokens=1000)
    assert rig.ledger.since(WORKER, 999.2) == PeerShare(110, 2, 2)
    assert rig.ledger.since(WORKER, 999.5) == PeerShare(100, 1, 1)
    assert rig.ledger.since(WORKER, 999.95) == NOTHING
    assert rig.ledger.since(WORKER, None) == PeerShare(111, 3, 3)
    assert rig.ledger.since(new_epoch(), None) == NOTHING


def test_decisions_of_several_gateways_may_come_in_any_order() -> None:
    rig = Rig()
    for decided_at in (999.9, 999.1, 999.5):
        rig.add(decided_at)
    assert rig.ledger.since(WORKER, 999.4).num_sequences == 2


def test_nothing_counts_for_longer_than_the_expiry_and_nothing_is_kept() -> None:
    rig = Rig()
    rig.add(1000.0)
    rig.clock.now += EXPIRE_S - 0.01
    assert rig.ledger.since(WORKER, None).num_sequences == 1
    rig.clock.now += 0.01
    assert rig.ledger.since(WORKER, None) == NOTHING
    rig.add(rig.clock.now, epoch=OTHER)
    assert rig.ledger.num_entries == 1
    rig.add(rig.clock.now - EXPIRE_S)
    assert rig.ledger.num_entries == 1


def test_workers_that_are_not_known_here_take_no_memory() -> None:
    rig = Rig()
    for _ in range(100):
        rig.add(1000.0, epoch=new_epoch())
    assert rig.ledger.num_entries == 0


def test_one_workers_decisions_are_bounded_and_the_oldest_give_way() -> None:
    rig = Rig()
    for number in range(MAX_PER_WORKER + 3):
        rig.add(999.0 + number / 10_000, num_tokens=number)
    assert rig.ledger.num_entries == MAX_PER_WORKER
    assert rig.ledger.since(WORKER, None).num_tokens == sum(range(3, MAX_PER_WORKER + 3))


def test_time_of_a_decision_survives_the_way_to_another_process() -> None:
    decision = Decision(WORKER, 50.0, 7, 2)
    received = heard(decision, sent_at=50.02, wall_at_sender=1e9, wall_here=1e9 + 0.03, here=400.0)
    assert received == Decision(WORKER, pytest.approx(399.95), 7, 2)


@pytest.mark.parametrize(("skew_s", "believed_s"), [(-3600.0, 0.0), (3600.0, MAX_TRANSIT_S)])
def test_clocks_that_disagree_move_a_decision_by_a_bounded_time(
    skew_s: float, believed_s: float
) -> None:
    decision = Decision(WORKER, 50.0, 7, 2)
    received = heard(decision, sent_at=50.0, wall_at_sender=1e9, wall_here=1e9 + skew_s, here=400.0)
    assert received.decided_at == pytest.approx(400.0 - believed_s)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "\ud800",
        "[]",
        "{}",
        '{"sender":"s","gateway_id":"g","sent_at":1,"decisions":[["ab",0,1,1]]}',
        '{"sender":"s","gateway_id":"g","sent_at":1,"decisions":[["%s",-1,1,1]]}' % ("0" * 32),
        '{"sender":"s","gateway_id":"g","sent_at":1,"decisions":[["%s",0,-1,1]]}' % ("0" * 32),
        '{"sender":"s","gateway_id":"g","sent_at":1,"decisions":[["%s",0,1.5,1]]}' % ("0" * 32),
        '{"sender":"s","gateway_id":"g","sent_at":"1","decisions":[]}',
        '{"sender":"s","gateway_id":"g","sent_at":NaN,"decisions":[]}',
        '{"sender":"s","gateway_id":"g","sent_at":1,"decisions":[],"more":1}',
    ],
)
def test_message_that_no_gateway_of_ours_sends_is_refused(message: str) -> None:
    with pytest.raises((ValidationError, ValueError)):
        Announcement.model_validate_json(message)


def test_message_of_too_many_decisions_is_refused() -> None:
    many = [("0" * 32, 0.0, 1, 1)] * (MAX_BATCH + 1)
    with pytest.raises(ValidationError):
        Announcement(sender="s", gateway_id="g", sent_at=1.0, decisions=many)
