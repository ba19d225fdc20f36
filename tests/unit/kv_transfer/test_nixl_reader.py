"""What the thread that reads over NIXL does where its library does what nobody has foreseen."""

from __future__ import annotations

import queue
from typing import Any, cast

import pytest

from baton.kv_layout import KvLayout
from kv_transfer.runs import Area, Runs
from kv_transfer.transports.base import LinkError
from kv_transfer.transports.nixl import Agent
from kv_transfer.transports.nixl_reader import Reader

WITHIN_S = 10.0
AREA = Area(KvLayout(1, 1, 1, 1, 8, "float32"), 0)


class Broken:
    """An agent with a defect, which shows once it reads."""

    def __init__(self) -> None:
        self.num_reads = 0

    def connect(self, metadata: bytes) -> None: ...

    def probe(self, name: str, area: Area) -> int:
        return 0

    def read(self, name: str, into: Runs, out_of: Runs) -> int:
        self.num_reads += 1
        return self.num_reads

    def is_done(self, handle: int) -> bool:
        if self.num_reads:
            raise RuntimeError("a defect")
        return True

    def release(self, handle: int) -> None: ...

    def progress(self) -> None: ...


def test_a_thread_that_fails_ends_its_worker_first_and_leaves_nobody_waiting() -> None:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    agent = Broken()
    reader = Reader(
        lambda: cast(Agent, agent), on_fatal=lambda error: told.put(("fatal", repr(error)))
    )
    reader.connect("peer", b"", AREA, timeout_s=WITHIN_S, made=told.put)
    reader.start(lambda error: None)
    peer = told.get(timeout=WITHIN_S)
    for name in ("first", "second"):
        reader.read(peer, lambda _: ([], []), lambda error, name=name: told.put((name, error)))
    assert told.get(timeout=WITHIN_S) == ("fatal", "RuntimeError('a defect')")
    ended = dict(told.get(timeout=WITHIN_S) for _ in range(2))
    assert ended.keys() == {"first", "second"}
    assert all(isinstance(error, RuntimeError) for error in ended.values())
    reader.connect("other", b"", AREA, timeout_s=WITHIN_S, made=told.put)
    assert isinstance(told.get(timeout=WITHIN_S), LinkError)
    reader.close(lambda: told.put("closed"))
    assert told.get(timeout=WITHIN_S) == "closed"


@pytest.mark.parametrize("error", [OSError("no such port"), LinkError("no card")], ids=repr)
def test_an_agent_that_cannot_be_made_is_said_and_may_be_asked_for_again(error: Exception) -> None:
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def make() -> Agent:
        raise error

    reader = Reader(make, on_fatal=told.put)
    for _ in range(2):
        reader.start(told.put)
        found = told.get(timeout=WITHIN_S)
        assert isinstance(found, LinkError)
        assert str(error) in str(found)
    reader.close(lambda: told.put("closed"))
    assert told.get(timeout=WITHIN_S) == "closed"
