"""What the thread that reads over NIXL does where its library does what nobody has foreseen."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from baton.kv_layout import KvLayout
from kv_transfer.runs import Area, Runs
from kv_transfer.transports import nixl_reader
from kv_transfer.transports.base import LinkError
from kv_transfer.transports.nixl import Agent
from kv_transfer.transports.nixl_reader import Peer, Reader

WITHIN_S = 10.0
AREA = Area(KvLayout(1, 1, 1, 1, 8, "float32"), 0)
NO_RUNS: Runs = np.zeros((0, 3), np.uint64)


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
        lambda: cast(Agent, agent),
        stall_s=WITHIN_S,
        on_fatal=lambda error: told.put(("fatal", repr(error))),
    )
    reader.connect("peer", b"", AREA, timeout_s=WITHIN_S, made=told.put)
    reader.start(lambda error: None)
    peer = told.get(timeout=WITHIN_S)
    for name in ("first", "second"):
        reader.read(
            peer,
            NO_RUNS,
            NO_RUNS,
            about_to=lambda: None,
            finished=lambda error, name=name: told.put((name, error)),
            stalled=told.put,
        )
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

    reader = Reader(make, stall_s=WITHIN_S, on_fatal=told.put)
    for _ in range(2):
        reader.start(told.put)
        found = told.get(timeout=WITHIN_S)
        assert isinstance(found, LinkError)
        assert str(error) in str(found)
    reader.close(lambda: told.put("closed"))
    assert told.get(timeout=WITHIN_S) == "closed"


STALL_S = 0.5
GIVE_UP_S = 1.5


class LosesReads:
    """An agent whose reads from some peers never end."""

    def __init__(self, lossy: set[str]) -> None:
        self.lossy = lossy
        self.lost: dict[int, str] = {}
        """The reads that do not end, and from whom."""
        self.held_up_s = 0.0
        """By the next look at a read, after which it takes two more to see its end."""
        self._num_vain_looks = 0
        self.is_closed = False
        self._num_reads = 0

    def connect(self, metadata: bytes) -> None: ...

    def forget(self, name: str) -> None:
        assert name not in self.lost.values(), "forgotten amid its reads"

    def probe(self, name: str, area: Area) -> int:
        return 0

    def read(self, name: str, into: Runs, out_of: Runs) -> int:
        self._num_reads += 1
        if name in self.lossy:
            self.lost[self._num_reads] = name
        return self._num_reads

    def is_done(self, handle: int) -> bool:
        if handle and self.held_up_s:
            time.sleep(self.held_up_s)
            self.held_up_s, self._num_vain_looks = 0.0, 2
        self._num_vain_looks -= 1
        return self._num_vain_looks < 0 and handle not in self.lost

    def release(self, handle: int) -> None:
        assert handle not in self.lost, "released before its end"

    def progress(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


@dataclass(frozen=True)
class Stalled:
    name: str
    reason: str


@dataclass(frozen=True)
class Finished:
    name: str
    error: str
    is_closed: bool
    """Whether the agent was that read."""


class Watched:
    """A reader, the agents that it has made, and what it has told."""

    def __init__(self) -> None:
        self.lossy: set[str] = set()
        self.agents: list[LosesReads] = []
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.reader = Reader(self._make, stall_s=STALL_S, on_fatal=self.told.put)

    def _make(self) -> Agent:
        self.agents.append(LosesReads(self.lossy))
        return cast(Agent, self.agents[-1])

    def heard(self) -> Any:
        return self.told.get(timeout=WITHIN_S)

    def connect(self, name: str) -> Any:
        """The peer, or why not."""
        made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.reader.connect(name, b"", AREA, timeout_s=WITHIN_S, made=made.put)
        return made.get(timeout=WITHIN_S)

    def read(self, peer: Peer) -> None:
        agent = self.agents[-1]
        self.reader.read(
            peer,
            NO_RUNS,
            NO_RUNS,
            about_to=lambda: None,
            finished=lambda error: self.told.put(
                Finished(peer.name, str(error or ""), agent.is_closed)
            ),
            stalled=lambda reason: self.told.put(Stalled(peer.name, reason)),
        )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(nixl_reader, "_GIVE_UP_S", GIVE_UP_S)
    made = Watched()
    made.reader.start(lambda error: None)
    yield made
    made.reader.close(lambda: made.told.put("closed"))
    while (told := made.heard()) != "closed":
        assert isinstance(told, Stalled | Finished)


def test_reads_that_do_not_end_fail_their_peer_soon_and_end_with_their_agent(
    watched: Watched,
) -> None:
    watched.lossy.add("lossy")
    lossy, sound = watched.connect("lossy"), watched.connect("sound")
    began = time.monotonic()
    watched.read(lossy)
    watched.read(lossy)
    stalled = Stalled("lossy", "no read has ended in 0.5 s")
    assert [watched.heard(), watched.heard()] == [stalled, stalled]
    assert time.monotonic() - began < GIVE_UP_S
    assert "no read has ended" in str(watched.connect("lossy"))  # at once: another can be tried
    watched.read(sound)
    assert watched.heard() == Finished("sound", "", is_closed=False)

    watched.lossy.clear()
    ended = Finished("lossy", "no read from lossy has ended in 2 s", is_closed=True)
    assert [watched.heard(), watched.heard()] == [ended, ended]
    assert time.monotonic() - began >= GIVE_UP_S
    again = watched.connect("lossy")
    for peer in (sound, again):
        watched.read(peer)
        assert watched.heard() == Finished(peer.name, "", is_closed=False)
    assert len(watched.agents) == 2


def test_reads_are_given_up_in_a_moment_without_others_and_their_peer_is_kept_until_then(
    watched: Watched,
) -> None:
    watched.lossy |= {"lossy", "slow"}
    lossy, slow = watched.connect("lossy"), watched.connect("slow")
    (agent,) = watched.agents
    watched.read(lossy)
    watched.read(slow)
    while len(agent.lost) < 2:
        time.sleep(0.001)
    watched.reader._jobs.put(lambda: setattr(lossy, "moved_at", -GIVE_UP_S))  # it is time
    assert watched.heard() == Stalled("lossy", "no read has ended in 0.5 s")
    assert "no read has ended" in str(watched.connect("lossy"))
    assert not agent.is_closed
    watched.lossy.clear()
    agent.lost = {number: name for number, name in agent.lost.items() if name == "lossy"}
    assert watched.heard() == Finished("slow", "", is_closed=False)
    ended = watched.heard()
    assert (ended.name, ended.is_closed) == ("lossy", True)
    assert isinstance(watched.connect("lossy"), Peer)


class LosesAProbe(LosesReads):
    """The first agent never hears of one peer; what it reads takes a moment."""

    def __init__(self, lossy: set[str]) -> None:
        super().__init__(lossy)
        self._ends_at: dict[int, float] = {}

    def probe(self, name: str, area: Area) -> int:
        return self.read(name, NO_RUNS, NO_RUNS)

    def read(self, name: str, into: Runs, out_of: Runs) -> int:
        number = super().read(name, into, out_of)
        self._ends_at[number] = time.monotonic() + 0.02
        return number

    def is_done(self, handle: int) -> bool:
        return handle not in self.lost and time.monotonic() > self._ends_at[handle]


def test_a_lost_probe_is_made_anew_however_much_is_read_from_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_reader, "_PROBE_S", 0.2)
    agents: list[LosesAProbe] = []

    def make() -> Agent:
        agents.append(LosesAProbe(set() if agents else {"lossy"}))
        return cast(Agent, agents[-1])

    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    reader, reading = Reader(make, stall_s=WITHIN_S, on_fatal=told.put), True

    def read(error: Exception | None = None) -> None:
        if error is not None:
            told.put(error)
        elif reading:
            reader.read(
                sound, NO_RUNS, NO_RUNS, about_to=lambda: None, finished=read, stalled=told.put
            )

    reader.start(lambda error: None)
    reader.connect("sound", b"", AREA, timeout_s=WITHIN_S, made=told.put)
    sound = told.get(timeout=WITHIN_S)
    for _ in range(2):  # which are under way by turns
        read()
        time.sleep(0.01)
    reader.connect("lossy", b"", AREA, timeout_s=2.0, made=told.put)
    assert isinstance(told.get(timeout=WITHIN_S), Peer)
    assert len(agents) == 2
    reading = False
    reader.close(lambda: told.put("closed"))
    assert told.get(timeout=WITHIN_S) == "closed"


def test_the_end_of_a_read_is_told_before_the_next_is_posted(watched: Watched) -> None:
    """On one host a read copies while it is posted: many posted at once would end as the last."""
    peer = watched.connect("sound")
    for number in range(3):
        watched.reader.read(
            peer,
            NO_RUNS,
            NO_RUNS,
            about_to=lambda number=number: watched.told.put((number, "posted")),  # type: ignore[misc]
            finished=lambda error, number=number: watched.told.put((number, "over")),  # type: ignore[misc]
            stalled=watched.told.put,
        )
    told = [watched.heard() for _ in range(6)]
    assert told == [(number, what) for number in range(3) for what in ("posted", "over")]


def test_what_is_posted_later_does_not_excuse_a_peer(watched: Watched) -> None:
    watched.lossy.add("lossy")
    lossy = watched.connect("lossy")
    for _ in range(30):
        watched.read(lossy)
        time.sleep(STALL_S / 10)
    assert watched.told.get_nowait() == Stalled("lossy", "no read has ended in 0.5 s")


def test_a_peer_whose_reads_take_turns_has_not_stalled(watched: Watched) -> None:
    """What is posted later may wait for long while those before it end."""
    watched.lossy.add("slow")
    peer = watched.connect("slow")
    for _ in range(10):
        watched.read(peer)
    (agent,) = watched.agents
    for number in range(1, 11):
        time.sleep(STALL_S / 5)
        del agent.lost[number]
        assert watched.heard() == Finished("slow", "", is_closed=False)


def test_a_thread_that_was_held_up_holds_it_against_nobody(watched: Watched) -> None:
    peer = watched.connect("peer")
    watched.agents[0].held_up_s = 2 * GIVE_UP_S
    watched.read(peer)
    assert watched.heard() == Finished("peer", "", is_closed=False)
