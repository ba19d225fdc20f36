"""Which workers must be killed, because they have vanished from the registry.

A worker that is stopped, or cut off, keeps its process and stops renewing its
record. What is counted against it is only time in which Redis answered us without
a break: an outage, a restart, or a sleep of our own begins the count anew.

1. STARTING: no record of this process has been seen. Killed after ``start_timeout_s``.
2. REGISTERED: its record is there. One that was renewed last before the process was
   started is that of a process before it, which died when nobody looked.
3. EXPIRED: its record ran out. Killed after ``fence_s``.
4. DEREGISTERED: its record went before it ran out, so the worker took it back itself
   and is draining. Killed when its drain is over for sure.

A process that is adopted without a record was registered once if an earlier controller
has noted so. Nobody saw how its record went: it may be draining, and gets the time for
that. One of which nothing is noted is STARTING: it may have been when that controller died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.backend import Started
from cluster.controller_store import Registered, RegistryRead
from cluster.slots import Cause, SlotView


@dataclass(frozen=True, slots=True)
class Verdict:
    """A process that must be killed, and why."""

    worker_id: str
    cause: Cause
    reason: str


@dataclass(slots=True, eq=False)
class _Watched:
    """One process."""

    process: Started
    stale_epoch: str | None
    """Of the process before it, whose record may still be there."""
    seen_at: float | None = None
    expires_at: float = 0.0
    present: bool = False
    deregistered: bool = False
    adopted_without: bool = False
    """It had a record once, and none when it was adopted."""
    unplaced_at: float = 0.0
    """When it was last seen waiting for a place: that is no part of its start."""


class Fencing:
    """Judges processes by what Redis answers. Times are those of one monotonic clock.

    ``drain_limit_s`` says for a pool when a worker's drain is over for sure.
    """

    def __init__(
        self,
        *,
        fence_s: float,
        start_timeout_s: float,
        ttl_s: float,
        drain_limit_s: Callable[[str], float],
    ) -> None:
        self._fence_s = fence_s
        self._start_timeout_s = start_timeout_s
        self._ttl_s = ttl_s
        self._drain_limit_s = drain_limit_s
        self._watched: dict[str, _Watched] = {}
        self._last_epoch: dict[str, str] = {}
        self._server: str | None = None
        self._answering_since: float | None = None
        self._answered_at = 0.0

    def is_registered(self, worker_id: str) -> bool:
        """Whether the process that runs was registered when Redis last answered."""
        watched = self._watched.get(worker_id)
        return watched is not None and watched.present

    def served(self) -> frozenset[str]:
        """Names of the processes that run and have ever been registered."""
        seen = (each for each in self._watched.values() if each.seen_at is not None)
        return frozenset(watched.process.name for watched in seen)

    def unanswered(self) -> None:
        """Redis did not answer."""
        self._answering_since = None

    def remember(self, read: RegistryRead) -> None:
        """Takes note of records that are older than the processes about to start."""
        self._last_epoch |= {name: found.epoch for name, found in read.workers.items()}

    def answered(self, read: RegistryRead, slots: Iterable[SlotView], now: float) -> list[Verdict]:
        """Who must be killed by what Redis says of ``slots``, which was asked at ``now``."""
        self._count_from(read.server, now)
        verdicts = []
        current: dict[str, _Watched] = {}
        for slot in slots:
            if slot.process is None:
                continue
            watched = current[slot.worker_id] = self._watch(slot, slot.process, read, now)
            self._look(watched, slot, read, now)
            if not slot.leaving and (verdict := self._judge(watched, slot, now)) is not None:
                verdicts.append(verdict)
        self._watched = current
        self.remember(read)
        return verdicts

    def _count_from(self, server: str, now: float) -> None:
        slept = now - self._answered_at >= self._fence_s
        if self._answering_since is None or self._server != server or slept:
            self._answering_since = now
            for watched in self._watched.values():
                watched.expires_at = now  # what is gone now went with Redis, not by itself
        self._server, self._answered_at = server, now

    def _watch(self, slot: SlotView, process: Started, read: RegistryRead, now: float) -> _Watched:
        watched = self._watched.get(slot.worker_id)
        if watched is not None and watched.process is process:
            return watched
        if not slot.adopted:
            return _Watched(process, self._last_epoch.get(slot.worker_id))
        if process.name in read.served:
            return _Watched(process, None, seen_at=now, adopted_without=True)
        return _Watched(process, None)

    def _look(self, watched: _Watched, slot: SlotView, read: RegistryRead, now: float) -> None:
        found = read.workers.get(slot.worker_id)
        watched.present = (
            found is not None
            and found.epoch != watched.stale_epoch
            and (slot.adopted or self._renewed_at(found, now) >= slot.started_at)
        )
        if watched.present:
            assert found is not None
            watched.seen_at, watched.deregistered, watched.adopted_without = now, False, False
            watched.expires_at = now + found.expires_in_s
        elif now < watched.expires_at - self._ttl_s / 8:
            watched.deregistered = True

    def _renewed_at(self, found: Registered, now: float) -> float:
        """Not later than it was: what Redis has answered was true after ``now``."""
        return now - (self._ttl_s - found.expires_in_s)

    def _judge(self, watched: _Watched, slot: SlotView, now: float) -> Verdict | None:
        assert self._answering_since is not None
        if watched.present:
            return None
        if watched.seen_at is None:
            if not watched.process.is_placed:
                watched.unplaced_at = now
            began_at = max(slot.started_at, watched.unplaced_at)
            waited_s = now - max(began_at, self._answering_since)
            if waited_s < self._start_timeout_s:
                return None
            reason = f"has not registered within {self._start_timeout_s:g} s of its start"
            return Verdict(slot.worker_id, "start_timeout", reason)
        gone_s = now - max(watched.seen_at, self._answering_since)
        limit_s, how = self._fence_s, "lost its registration"
        if watched.adopted_without:
            limit_s = max(limit_s, self._drain_limit_s(slot.pool))
            how = "was adopted without its registration"
        elif watched.deregistered:
            limit_s, how = self._drain_limit_s(slot.pool), "deregistered itself"
        if gone_s < limit_s:
            return None
        return Verdict(slot.worker_id, "fenced", f"{how} {gone_s:.1f} s ago and still runs")
