"""Keeps what should run running: one loop that compares desired with actual.

Each worker id has a slot, and a slot has at most one process:

1. EMPTY: nothing runs. ``reconcile`` starts a process once ``retry_at`` is due.
2. LIVE: a task owns the process from its start to the proof of its end, then
   empties the slot and sets ``retry_at``.
3. LEAVING: ``retire`` or ``stop`` was asked for. The process is asked to end, and
   killed when its bound is over; once it is proved gone, so is the slot.

So a replacement never starts before its predecessor is proved gone. A process
that dies before it has served for a while is replaced later and later (``backoff_s``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from baton.errors import BatonError
from cluster.backend import Exit, PoolBackend, Started
from cluster.slots import STABLE_S, Cause, Slot, SlotView, WorkerEvent, backoff_s

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.25
"""Pause between two questions whether processes may be started."""
PROOF_S = 5.0
"""How long a killed process may take to be proved gone, before a stop goes on, and
before it is killed once more."""


class Reconciler:
    """Runs the given workers; all methods belong to one event loop."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[WorkerEvent], None] = lambda _: None,
        may_start: Callable[[], bool] = lambda: True,
        told_who_serves: bool = False,
    ) -> None:
        """``told_who_serves``: somebody calls ``serves``; without, a process is taken to
        serve from its start."""
        self._told_who_serves = told_who_serves
        self._may_start = may_start
        self._clock = clock
        self._on_event = on_event
        self._slots: dict[str, Slot] = {}
        self._wake = asyncio.Event()
        self._tells: set[asyncio.Task[None]] = set()

    # ---------------------------------------------------------------- desired

    def want(self, pool: str, worker_ids: Sequence[str], backend: PoolBackend) -> None:
        """Adds workers to what should run; the next pass starts them."""
        for worker_id in worker_ids:
            self._add(Slot(pool, worker_id, backend))
        self._wake.set()

    def adopt(self, pool: str, worker_id: str, process: Started, backend: PoolBackend) -> None:
        """Adds a worker that runs already."""
        slot = Slot(pool, worker_id, backend, adopted=True)
        self._add(slot)
        logger.info("%s still runs", worker_id)
        slot.life = self._begin_life(slot, process)

    def _add(self, slot: Slot) -> None:
        assert slot.worker_id not in self._slots, f"{slot.worker_id} is wanted twice"
        self._slots[slot.worker_id] = slot

    def retire(self, worker_id: str, *, limit_s: float) -> None:
        """Lets a worker go: it is asked to end, and killed after ``limit_s`` seconds. Its
        slot is there until it is proved gone; one without a process goes at once."""
        slot = self._slots[worker_id]
        if slot.leaving:
            return
        slot.leaving = True
        logger.info("%s is to leave, within %g s", worker_id, limit_s)
        if slot.life is None:
            self._remove(slot, "had no process")
            return
        slot.kill_at = self._clock() + limit_s
        if slot.process is not None:
            self._tell(slot.process.stop(), f"stop {worker_id}")
        self._wake.set()

    def kill(self, worker_id: str, cause: Cause, reason: str) -> None:
        """Has a process killed and replaced as if it had died, for ``reason``. Idempotent."""
        slot = self._slots[worker_id]
        assert slot.process is not None, f"{worker_id} has no process"
        if slot.verdict:
            return
        slot.cause, slot.verdict = cause, reason
        slot.kill_at = self._clock()
        self._wake.set()

    def serves(self, worker_id: str) -> None:
        """Takes note that its process has come to serve. Idempotent."""
        slot = self._slots[worker_id]
        assert slot.process is not None, f"{worker_id} has no process"
        if slot.serves_since is None:
            slot.serves_since = self._clock()

    # ----------------------------------------------------------------- actual

    def slots(self) -> list[SlotView]:
        """All there are, the leaving ones too."""
        return [slot.view() for slot in self._slots.values()]

    def running(self) -> Mapping[str, str]:
        """Pool of every worker id that has a process now."""
        return {s.worker_id: s.pool for s in self._slots.values() if s.process is not None}

    async def run(self) -> None:
        """Reconciles until cancelled; what runs then goes on running."""
        while True:
            self._wake.clear()
            due_in_s = self.reconcile()
            # Not wait_for, which before Python 3.12 can swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_in_s):
                    await self._wake.wait()

    def reconcile(self) -> float | None:
        """One pass: does what is due. Seconds until the next is due, None for none."""
        now = self._clock()
        dues = [self._pass(slot, now) for slot in self._slots.values()]
        return min((due - now for due in dues if due is not None), default=None)

    def _pass(self, slot: Slot, now: float) -> float | None:
        """Does what is due for one slot. When something is due next."""
        if slot.life is None:
            if slot.retry_at > now:
                return slot.retry_at
            if not self._may_start():
                return now + ASK_AGAIN_S
            slot.life = self._begin_life(slot, None)
            return None
        if slot.kill_at is None:
            return None
        if slot.kill_at <= now:
            slot.kill_at = now + PROOF_S
            self._kill(slot)
        return slot.kill_at

    def _kill(self, slot: Slot) -> None:
        logger.warning("killing %s: it %s", slot.worker_id, slot.verdict or "has not ended in time")
        if slot.process is not None:
            self._tell(slot.process.kill(), f"kill {slot.worker_id}")
        elif slot.life is not None:  # its start hangs
            slot.life.cancel()

    def _tell(self, telling: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Has a backend told something that nobody waits for."""

        async def tell() -> None:
            try:
                await telling
            except Exception:
                logger.exception("could not %s", what)

        task = asyncio.create_task(tell(), name=what)
        self._tells.add(task)
        task.add_done_callback(self._tells.discard)
        return task

    # ------------------------------------------------------------- one process

    def _begin_life(self, slot: Slot, process: Started | None) -> asyncio.Task[None]:
        if process is not None:
            self._note_start(slot, process)
        return asyncio.create_task(self._live(slot, process), name=f"life of {slot.worker_id}")

    def _note_start(self, slot: Slot, process: Started) -> None:
        slot.process, slot.started_at = process, self._clock()
        slot.serves_since = None if self._told_who_serves else slot.started_at

    async def _live(self, slot: Slot, process: Started | None) -> None:
        """Owns one process of a slot from its start to its proved end."""
        born = self._clock()
        try:
            if process is None:
                process = await self._start(slot)
            end = await process.wait()
        except BatonError as error:
            end = Exit(None, f"could not be started: {error.message}")
        except asyncio.CancelledError:
            if slot.leaving:
                self._remove(slot, "had not been started")
            raise
        except Exception as error:  # a backend's fault costs one process, not the loop
            logger.exception("%s: the backend failed", slot.worker_id)
            if slot.process is not None:  # nobody would know of it, beside its replacement
                self._tell(slot.process.kill(), f"kill {slot.worker_id}")
            end = Exit(None, f"could not be watched: {error}")
        finally:
            slot.process = None
            slot.life = None
            slot.adopted = False
        self._bury(slot, end, lived_s=self._clock() - born)

    async def _start(self, slot: Slot) -> Started:
        process = await slot.backend.start(slot.pool, slot.worker_id)
        self._note_start(slot, process)
        logger.info("%s started", slot.worker_id)
        self._on_event(WorkerEvent("started", slot.pool, slot.worker_id))
        if slot.leaving:  # was asked for while it started
            self._tell(process.stop(), f"stop {slot.worker_id}")
        return process

    def _remove(self, slot: Slot, reason: str) -> None:
        del self._slots[slot.worker_id]
        logger.info("%s is gone: it %s", slot.worker_id, reason)
        self._on_event(WorkerEvent("stopped", slot.pool, slot.worker_id, reason))

    def _bury(self, slot: Slot, end: Exit, *, lived_s: float) -> None:
        if slot.leaving:
            self._remove(slot, end.reason)
            return
        reason, cause, now = end.reason, slot.cause, self._clock()
        if slot.verdict:
            reason = f"was killed: it {slot.verdict}"
        slot.cause, slot.verdict, slot.kill_at = "died", "", None
        stable = slot.serves_since is not None and now - slot.serves_since >= STABLE_S
        slot.serves_since = None
        slot.quick_deaths = 0 if stable else slot.quick_deaths + 1
        delay_s = backoff_s(slot.quick_deaths)
        slot.retry_at = now + delay_s
        logger.warning(
            "%s %s after %.1f s; starting it again in %.1f s",
            slot.worker_id, reason, lived_s, delay_s,
        )  # fmt: skip
        self._on_event(WorkerEvent("died", slot.pool, slot.worker_id, reason, delay_s, cause))
        self._wake.set()

    # ------------------------------------------------------------------- stop

    async def stop(self, pools: Sequence[str], *, limit_s: float, hurry: asyncio.Event) -> int:
        """Stops these pools' workers for good and returns when all are gone, those that
        were leaving already included.

        They are asked first; what has not ended after ``limit_s`` seconds, or once
        ``hurry`` is set, is killed. Returns how many had to be killed.
        """
        slots = [slot for slot in self._slots.values() if slot.pool in pools]
        for slot in slots:
            self.retire(slot.worker_id, limit_s=limit_s)
        lives = {slot.life for slot in slots if slot.life is not None}
        await _wait_all(lives, limit_s, hurry)
        num_killed = 0
        for slot in slots:
            if slot.life is not None:
                num_killed += slot.process is not None
                self._kill(slot)
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
