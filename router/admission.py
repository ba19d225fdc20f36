"""How many choices are served at once, how many wait, and who hears "later".

A choice is WAITING (the lowest ``priority`` first, equal ones in order of arrival), then
ADMITTED until it releases its place; nobody takes that from it. One that would wait beyond
its deadline, as far as can be foreseen, is refused at once. So is one that finds the queue
full, unless somebody of worse priority is in it: then the last of these is refused instead.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right, insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter

from baton.errors import DeadlineExceededError, OverloadedError
from baton.telemetry import GatewayMetrics

RECENT = 0.1
"""Weight of the newest service time in their moving average."""
_PRIORITY = attrgetter("priority")


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    priority: int
    keeps_place: bool
    place: asyncio.Future[None]
    """Done when a place is the waiter's, or a better priority has put it out of the queue."""


class Admission:
    """``max_in_flight`` places, and a queue of ``max_queued`` for them."""

    def __init__(self, *, max_in_flight: int, max_queued: int, metrics: GatewayMetrics) -> None:
        self._max_in_flight = max_in_flight
        self._max_queued = max_queued
        self._metrics = metrics
        self._in_flight = 0
        self._waiting: list[_Waiter] = []  # the next one first
        self._service_s: float | None = None

    @property
    def num_in_flight(self) -> int:
        return self._in_flight

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def admitted(
        self, deadline: float, priority: int = 0, *, keeps_place: bool = False
    ) -> AsyncIterator[None]:
        """Holds a place while the block runs; ``deadline`` is on the event loop's clock.
        Who ``keeps_place`` is put out of the queue by nobody.

        Raises: OverloadedError when the queue is full, or is filled by better priorities,
        or is too long for the deadline; DeadlineExceededError when the deadline passes in
        it all the same.
        """
        loop = asyncio.get_running_loop()
        await self._acquire(deadline, priority, keeps_place)
        began = loop.time()
        try:
            yield
        finally:
            self._observe(loop.time() - began)
            self._release()

    def retry_after_s(self) -> float:
        """Whole seconds, at least 1, until those in line will have been served."""
        rounds = (len(self._waiting) + 1) / self._max_in_flight
        return float(max(1, math.ceil(rounds * (self._service_s or 0.0))))

    async def _acquire(self, deadline: float, priority: int, keeps_place: bool) -> None:
        if self._in_flight < self._max_in_flight:
            self._in_flight += 1
            return
        num_before = bisect_right(self._waiting, priority, key=_PRIORITY)
        wait_s = self._expected_wait_s(num_before)
        if wait_s > deadline - asyncio.get_running_loop().time() > 0:
            raise self._overloaded(
                f"those that wait already will take about {wait_s:.0f} s, which is beyond the "
                "request's deadline"
            )
        if len(self._waiting) >= self._max_queued and not self._put_out(num_before):
            raise self._overloaded("too many requests are waiting")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._wait(_Waiter(priority, keeps_place, place), deadline)

    def _overloaded(self, reason: str) -> OverloadedError:
        return OverloadedError(f"{reason}; try again later", retry_after_s=self.retry_after_s())

    def _expected_wait_s(self, num_before: int) -> float:
        """Until a place is free for one more: all before it have to be given one first, and
        places come free as fast as choices have been served lately. Its own service does
        not count, nor do better priorities that are still to come, so this refuses rather
        too few."""
        return num_before / self._max_in_flight * (self._service_s or 0.0)

    def _put_out(self, num_before: int) -> bool:
        """Refuses the last waiter behind the first ``num_before``. False: all of these keep
        their places."""
        for index in reversed(range(num_before, len(self._waiting))):
            if not self._waiting[index].keeps_place:
                place = self._waiting.pop(index).place
                if not place.done():
                    place.set_exception(
                        self._overloaded("requests of better priority have filled the queue")
                    )
                return True
        return False

    async def _wait(self, waiter: _Waiter, deadline: float) -> None:
        """Returns holding a place, which whoever released it has handed over."""
        insort(self._waiting, waiter, key=_PRIORITY)
        self._count_queued()
        place = waiter.place
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._release()  # it came too late for us
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError("the deadline passed while waiting in line") from None
            raise
        finally:
            self._count_queued()

    def _release(self) -> None:
        """Hands the place to the first in line, or frees it."""
        while self._waiting:
            place = self._waiting.pop(0).place
            if not place.done():
                place.set_result(None)
                return
        self._in_flight -= 1

    def _observe(self, service_s: float) -> None:
        past = service_s if self._service_s is None else self._service_s
        self._service_s = past + RECENT * (service_s - past)

    def _count_queued(self) -> None:
        self._metrics.choices_queued.set(len(self._waiting))
