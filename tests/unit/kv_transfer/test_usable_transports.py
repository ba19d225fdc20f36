"""A transport that has failed is left out for a while, longer each time, and not for good."""

from __future__ import annotations

from kv_transfer.usable_transports import RETRY_S, TransportsByPeer, UsableTransports


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_all_are_tried_where_none_of_the_rest_is_wanted() -> None:
    clock = Clock()
    usable = UsableTransports(["nixl", "gloo"], clock=clock)
    usable.leave_out("nixl", "no answer")
    usable.try_all()
    assert usable.names() == ("nixl", "gloo")
    assert not usable.reason
    usable.leave_out("nixl", "no answer")
    clock.now = 1.5 * RETRY_S
    assert usable.names() == ("gloo",), "it is left out for longer each time"


def test_one_that_failed_is_left_out_until_it_is_due() -> None:
    clock = Clock()
    usable = UsableTransports(["nixl", "gloo"], clock=clock)
    usable.leave_out("nixl", "no answer")
    assert usable.names() == ("gloo",)
    assert usable.reason == "nixl failed: no answer"
    assert not usable.is_one_due
    clock.now = RETRY_S
    assert usable.is_one_due
    assert usable.names() == ("nixl", "gloo")
    assert not usable.is_one_due, "it is tried now"
    assert not usable.reason


def test_each_failure_in_a_row_is_waited_for_twice_as_long() -> None:
    clock = Clock()
    usable = UsableTransports(["nixl", "gloo"], clock=clock)
    for delay_s in (RETRY_S, 2 * RETRY_S, 4 * RETRY_S):
        usable.leave_out("nixl", "no answer")
        clock.now += delay_s - 1
        assert usable.names() == ("gloo",)
        clock.now += 1
        assert usable.names() == ("nixl", "gloo")
    usable.works("nixl")
    usable.leave_out("nixl", "no answer")
    clock.now += RETRY_S
    assert usable.names() == ("nixl", "gloo")


def test_one_that_cannot_be_used_here_never_is() -> None:
    clock = Clock()
    usable = UsableTransports(["shared_memory", "gloo"], clock=clock)
    usable.remove("shared_memory")
    clock.now = 2 * RETRY_S
    assert usable.names() == ("gloo",)
    assert not usable.is_one_due


def test_what_failed_with_one_peer_is_remembered_and_is_tried_with_others() -> None:
    usable = TransportsByPeer(["nixl", "gloo"])
    usable.of("a").leave_out("nixl", "no answer")
    assert usable.of("a").names() == ("gloo",)
    assert usable.of("b").names() == ("nixl", "gloo")
    for number in range(1000):
        usable.of(number)
    assert len(usable._by_peer) < 1000, "of peers that are long gone"
