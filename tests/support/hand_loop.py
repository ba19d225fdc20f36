"""Event loops of several pretended processes in one thread, each run by hand on a common clock.

What coroutines and callbacks of the product need of a loop is here, and nothing happens on one
but in ``run``: a test so decides in which order processes do what they have to do, or that one
of them is stopped.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any


class Clock:
    now = 0.0


class _Handle:
    """As asyncio.Handle, without what a loop of asyncio's own wants of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call

    def cancel(self) -> None:
        self.call = None

    def cancelled(self) -> bool:
        return self.call is None


class HandLoop:
    """``process`` is whose loop it is, for what is called from within."""

    def __init__(self, clock: Clock, process: Any) -> None:
        self.process = process
        self._clock = clock
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._numbers = itertools.count()
        self._is_ending = False
        self._threads: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()

    def run(self) -> None:
        """All that is due, and what comes of it. Raises AssertionError for what it raises."""
        with self.running():
            while True:
                while self._timers and self._timers[0][0] <= self._clock.now:
                    self._ready.append(heapq.heappop(self._timers)[2])
                if not self._ready:
                    return
                if (call := self._ready.popleft().call) is not None:
                    self._call(call)

    def _call(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            if self._is_ending:
                return
            raise AssertionError(f"the process crashed: {error!r}") from error

    def finish_thread(self) -> bool:
        """Completes the oldest of what runs in a thread. Was there any?"""
        if not self._threads:
            return False
        future, work = self._threads.popleft()
        if not future.done():
            future.set_result(work())
        return True

    def end(self) -> None:
        """Cancels every task and lets them go, whatever comes of that."""
        self._is_ending = True
        for _ in range(20):
            tasks = asyncio.all_tasks(self)  # type: ignore[arg-type]
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            self.run()
        raise AssertionError(f"tasks that cannot be cancelled: {tasks}")

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        with self.running():
            return self.create_task(work)

    @contextmanager
    def running(self) -> Iterator[None]:
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            asyncio._set_running_loop(before)

    # ------------------------------------------------------------------ as an event loop

    def time(self) -> float:
        return self._clock.now

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Handle:
        handle = self._handle(callback, args, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> _Handle:
        handle = self._handle(callback, args, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> _Handle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    @staticmethod
    def _handle(callback: Callable[..., Any], args: Any, context: Context | None) -> _Handle:
        if context is None:
            return _Handle(lambda: callback(*args))
        return _Handle(lambda: context.run(callback, *args))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def run_in_executor(self, executor: object, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """It runs when ``finish_thread`` says so; nobody's thread is used."""
        future = self.create_future()
        self._threads.append((future, work))
        return future

    def create_task(self, work: Coroutine[Any, Any, Any], **named: Any) -> asyncio.Task[Any]:
        return asyncio.Task(work, loop=self, **named)  # type: ignore[arg-type]

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Of what was let go of: what a callback raises, ``run`` raises."""
