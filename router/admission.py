"""How many choices are served at once, how many wait, and who hears "later".

A choice is WAITING (first come, first served), then ADMITTED until it releases
its place. One that finds the queue full is refused at once, and so is one that would
wait in it beyond its deadline, as far as can be foreseen.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.errors import DeadlineExceededError, OverloadedError
from baton.telemetry import GatewayMetrics

RECENT = 0.1
"""Weight of the newest service time in their moving average."""


class Admission:
    """``max_in_flight`` places, and a queue of ``max_queued`` for them."""

    def __init__(self, *, max_in_flight: int, max_queued: int, metrics: GatewayMetrics) -> None:
        self._max_in_flight = max_in_flight
        self._max_queued = max_queued
        self._metrics = metrics
        self._in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._service_s: float | None = None

    @property
    def num_in_flight(self) -> int:
        return self._in_flight

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def admitted(self, deadline: float) -> AsyncIterator[None]:
        """Holds a place while the block runs; ``deadline`` is on the event loop's clock.

        Raises: OverloadedError when the queue is full or too long for the deadline;
        DeadlineExceededError when the deadline passes in it all the same.
        """
        loop = asyncio.get_running_loop()
        await self._acquire(deadline)
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

    async def _acquire(self, deadline: float) -> None:
        if self._in_flight < self._max_in_flight:
            self._in_flight += 1
            return
        if len(self._waiting) >= self._max_queued:
            raise OverloadedError(
                "too many requests are waiting; try again later", retry_after_s=self.retry_after_s()
            )
        wait_s = self._expected_wait_s()
        if wait_s > deadline - asyncio.get_running_loop().time() > 0:
            raise OverloadedError(
                f"those that wait already will take about {wait_s:.0f} s, which is beyond the "
                "request's deadline; try again later",
                retry_after_s=self.retry_after_s(),
            )
        await self._wait(deadline)

    def _expected_wait_s(self) -> float:
        """Until a place is free for one more: all before it have to be given one first, and
        places come free as fast as choices have been served lately. Its own service does
        not count, so this refuses rather too few."""
        return len(self._waiting) / self._max_in_flight * (self._service_s or 0.0)

    async def _wait(self, deadline: float) -> None:
        """Returns holding a place, which whoever released it has handed over."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._count_queued()
        try:
            async with asyncio.timeout_at(deadline):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._release()  # it came too late for us
            elif place in self._waiting:
                self._waiting.remove(place)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError("the deadline passed while waiting in line") from None
            raise
        finally:
            self._count_queued()

    def _release(self) -> None:
        """Hands the place to the first in line, or frees it."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._in_flight -= 1

    def _observe(self, service_s: float) -> None:
        past = service_s if self._service_s is None else self._service_s
        self._service_s = past + RECENT * (service_s - past)

    def _count_queued(self) -> None:
        self._metrics.choices_queued.set(len(self._waiting))
