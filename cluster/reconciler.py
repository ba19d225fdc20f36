"""Keeps what should run running: one loop that compares desired with actual.

Each worker id has a slot, and a slot has at most one process:

1. EMPTY: nothing runs. ``reconcile`` starts a process once ``retry_at`` is due.
2. LIVE: a task owns the process from its start to the proof of its end, then
   empties the slot and sets ``retry_at``.
3. STOPPING: ``stop`` was asked for; the slot is emptied and not filled again.

So a replacement never starts before its predecessor is proved gone. A process
that dies soon after its start is replaced later and later (``backoff_s``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from baton.errors import BatonError
from cluster.backend import Exit, PoolBackend, Started

logger = logging.getLogger(__name__)

STABLE_S = 30.0
"""A process that lived this long did not die of its start."""
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
PROOF_S = 5.0
"""How long a killed process may take to be proved gone, before a stop goes on."""


def backoff_s(quick_deaths: int) -> float:
    """Delay before the next start, after so many quick deaths in a row."""
    if quick_deaths == 0:
        return 0.0
    return float(min(FIRST_DELAY_S * 2 ** min(quick_deaths - 1, 32), MAX_DELAY_S))


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """What the reconciler did or saw."""

    kind: Literal["started", "died", "stopped"]
    role: str
    worker_id: str
    reason: str = ""
    retry_in_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Slot:
    role: str
    worker_id: str
    backend: PoolBackend
    process: Started | None = None
    life: asyncio.Task[None] | None = None
    quick_deaths: int = 0
    retry_at: float = 0.0
    stopping: bool = False


class Reconciler:
    """Runs the given workers; all methods belong to one event loop."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[WorkerEvent], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._on_event = on_event
        self._slots: dict[str, _Slot] = {}
        self._wake = asyncio.Event()

    def want(self, role: str, worker_ids: Sequence[str], backend: PoolBackend) -> None:
        """Adds workers to what should run; the next pass starts them."""
        for worker_id in worker_ids:
            assert worker_id not in self._slots, f"{worker_id} is wanted twice"
            self._slots[worker_id] = _Slot(role, worker_id, backend)
        self._wake.set()

    def running(self) -> Mapping[str, str]:
        """Role of every worker id that has a process now."""
        return {s.worker_id: s.role for s in self._slots.values() if s.process is not None}

    async def run(self) -> None:
        """Reconciles until cancelled; what runs then goes on running."""
        while True:
            self._wake.clear()
            due_in_s = self.reconcile()
            try:
                await asyncio.wait_for(self._wake.wait(), due_in_s)
            except TimeoutError:
                continue

    def reconcile(self) -> float | None:
        """One pass: starts what is due. Seconds until the next is due, None for none."""
        now = self._clock()
        delays: list[float] = []
        for slot in self._slots.values():
            if slot.life is not None or slot.stopping:
                continue
            if slot.retry_at > now:
                delays.append(slot.retry_at - now)
            else:
                slot.life = asyncio.create_task(self._live(slot), name=f"life of {slot.worker_id}")
        return min(delays, default=None)

    async def _live(self, slot: _Slot) -> None:
        """Owns one process of a slot from its start to its proved end."""
        born = self._clock()
        try:
            slot.process = await slot.backend.start(slot.role, slot.worker_id)
            logger.info("%s started", slot.worker_id)
            self._on_event(WorkerEvent("started", slot.role, slot.worker_id))
            if slot.stopping:  # was asked for while it started
                await slot.process.stop()
            end = await slot.process.wait()
        except BatonError as error:
            end = Exit(None, f"could not be started: {error.message}")
        except Exception as error:  # a backend's fault costs one process, not the loop
            logger.exception("%s: the backend failed", slot.worker_id)
            end = Exit(None, f"could not be watched: {error}")
        finally:
            slot.process = None
            slot.life = None
        self._bury(slot, end, lived_s=self._clock() - born)

    def _bury(self, slot: _Slot, end: Exit, *, lived_s: float) -> None:
        if slot.stopping:
            logger.info("%s stopped: it %s", slot.worker_id, end.reason)
            self._on_event(WorkerEvent("stopped", slot.role, slot.worker_id, end.reason))
            return
        slot.quick_deaths = 0 if lived_s >= STABLE_S else slot.quick_deaths + 1
        delay_s = backoff_s(slot.quick_deaths)
        slot.retry_at = self._clock() + delay_s
        logger.warning(
            "%s %s after %.1f s; starting it again in %.1f s",
            slot.worker_id, end.reason, lived_s, delay_s,
        )  # fmt: skip
        self._on_event(WorkerEvent("died", slot.role, slot.worker_id, end.reason, delay_s))
        self._wake.set()

    async def stop(self, roles: Sequence[str], *, limit_s: float, hurry: asyncio.Event) -> int:
        """Stops these roles' workers for good and returns when all are gone.

        They are asked first; what has not ended after ``limit_s`` seconds, or once
        ``hurry`` is set, is killed. Returns how many had to be killed.
        """
        slots = [slot for slot in self._slots.values() if slot.role in roles]
        for slot in slots:
            slot.stopping = True
        lives = {slot.life for slot in slots if slot.life is not None}
        await asyncio.gather(*(s.process.stop() for s in slots if s.process is not None))
        await _wait_all(lives, limit_s, hurry)
        num_killed = 0
        for slot in slots:
            if slot.process is not None:
                logger.warning("%s has not stopped in time; killing it", slot.worker_id)
                await slot.process.kill()
                num_killed += 1
            elif slot.life is not None:
                slot.life.cancel()
        await _wait_all(lives, PROOF_S, asyncio.Event())
        for slot in slots:
            if slot.life is not None:
                logger.error("%s is not proved gone", slot.worker_id)
        return num_killed


async def _wait_all(tasks: set[asyncio.Task[None]], limit_s: float, hurry: asyncio.Event) -> None:
    """Until all are done, at most ``limit_s`` seconds, not longer than till ``hurry``."""
    if not tasks:
        return
    everything = asyncio.ensure_future(asyncio.wait(tasks))
    hurried = asyncio.ensure_future(hurry.wait())
    try:
        await asyncio.wait(
            {everything, hurried}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        everything.cancel()
        hurried.cancel()
        await asyncio.gather(everything, hurried, return_exceptions=True)
