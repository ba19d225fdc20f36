"""Values that two threads of two processes wait for, without waiting for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_transfer.transports.base import LinkError
from kv_transfer.transports.rendezvous import Rendezvous


def test_both_ends_know_what_either_sets() -> None:
    ends: list[Rendezvous] = []
    ends.append(Rendezvous(lambda key, value: ends[1].received(key, value)))
    ends.append(Rendezvous(lambda key, value: ends[0].received(key, value)))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ends[0].wait, ["a", "b"], 10)
        ends[1].set("b", b"2")
        ends[0].set("a", b"1")
        assert waiting.result() == [b"1", b"2"]
    assert ends[1].wait(["a"], 0) == [b"1"]


def test_peer_that_does_not_turn_up_is_an_error() -> None:
    with pytest.raises(LinkError, match="did not turn up"):
        Rendezvous(lambda key, value: None).wait(["a"], 0)


def test_lost_stream_wakes_whoever_waits() -> None:
    end = Rendezvous(lambda key, value: None)
    threading.Timer(0, end.close).start()
    with pytest.raises(LinkError, match="gone"):
        end.wait(["a"], 60)
