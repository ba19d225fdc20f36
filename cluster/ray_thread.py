"""The one thread of the launcher that calls Ray, whose calls block."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from baton.errors import UnavailableError

T = TypeVar("T")


class RayThread:
    """Runs calls one after another. It lives until the process ends, because the
    kernel kills Ray's processes when the thread that started them ends; and it is a
    daemon, so that a call that hangs cannot keep the process from ending."""

    def __init__(self) -> None:
        self.given_up = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="ray", daemon=True).start()

    def _run(self) -> None:
        while True:
            future, function = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def give_up(self) -> None:
        """Ray has died: refuses all calls from now on, which could only hang."""
        self.given_up = True

    async def call(self, function: Callable[[], T]) -> T:
        """Its result or exception. When the caller is cancelled, a call that has
        begun goes on and one that has not is dropped.

        Raises: UnavailableError once Ray was given up.
        """
        if self.given_up:
            raise UnavailableError("Ray has died")
        future: Future[T] = Future()
        self._calls.put((future, function))
        return await asyncio.wrap_future(future)
