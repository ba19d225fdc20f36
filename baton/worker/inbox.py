"""The two queues between a worker's event loop and its engine thread.

Commands go in through ``post`` from any thread; whatever has to happen on the
event loop goes out through ``call``. Nothing else is shared.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

Command = Callable[[], None]
"""Run by the engine thread, between two steps."""


class Inbox:
    """Commands for the engine thread, in order of arrival."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._loop = loop

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Has the engine thread call ``function(*args)``; returns at once."""
        self._queue.put(lambda: function(*args))

    def fail(self, error: BaseException) -> None:
        """Has the engine thread die of ``error``, and the worker with it; returns at once."""

        def die() -> None:
            raise error

        self._queue.put(die)

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Has the event loop call ``function(*args)``; returns at once.

        An exception ends the worker: what it left undone, blocks that nobody gives back, say,
        would stay so for as long as the process lives.
        """

        def call() -> None:
            try:
                function(*args)
            except Exception as error:
                logger.exception("the event loop failed to do what the engine asked for")
                self.fail(error)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def run_pending(self, *, wait_s: float) -> bool:
        """Runs what has arrived; waits up to ``wait_s`` for the first. Was there any?"""
        try:
            command = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return False
        command()
        for _ in range(self._queue.qsize()):
            self._queue.get_nowait()()
        return True
