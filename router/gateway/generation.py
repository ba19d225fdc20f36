"""All choices of one request, run side by side and read as one sequence of deltas.

What is done here is done for every token of every stream: no task, timer or timeout is made for
one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from types import TracebackType

from baton.errors import BatonError, InternalError
from router.gateway.choices import ChoiceStream, Delta
from router.interfaces import Orchestrator

_log = logging.getLogger(__name__)

_CLOSING_S = 5.0
"""For choices that have given their last delta to end by themselves."""


class _Silence:
    """Calls ``told`` after every ``interval_s`` in which ``broken`` was not called."""

    def __init__(self, interval_s: float, told: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._told = told
        self._loop = asyncio.get_running_loop()
        self.broken()
        self._timer = self._loop.call_at(self._since + interval_s, self._look)

    def broken(self) -> None:
        self._since = self._loop.time()

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._loop.time() >= self._since + self._interval_s:
            self.broken()
            self._told()
        self._timer = self._loop.call_at(self._since + self._interval_s, self._look)


class Generation:
    """Leaving the scope ends every choice that still runs and waits until it has ended."""

    def __init__(
        self,
        runs: Sequence[ChoiceStream],
        orchestrator: Orchestrator,
        *,
        silence_s: float | None = None,
    ) -> None:
        """``silence_s``: after so long without a delta ``batch`` returns an empty list."""
        assert runs
        self._runs = runs
        self._orchestrator = orchestrator
        self._num_unfinished = len(runs)
        self._queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._silence_s = silence_s
        self._silence: _Silence | None = None
        self._failure: BatonError | None = None
        self._closing = False

    async def __aenter__(self) -> Generation:
        if self._silence_s is not None:
            self._silence = _Silence(self._silence_s, lambda: self._queue.put_nowait(None))
        self._tasks = [
            asyncio.create_task(
                run.run(self._orchestrator, self._queue.put_nowait),
                name=f"choice {run.choice.choice_index} of {run.choice.request_id}",
            )
            for run in self._runs
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        return self

    async def batch(self) -> list[Delta] | None:
        """The next deltas, all that are there; an empty list after a silence; None after every
        choice's last.

        Cancelling it loses nothing. Raises the BatonError of a choice that failed.
        """
        if self._num_unfinished == 0:
            return None
        if self._failure is not None:
            raise self._failure
        item = await self._queue.get()
        deltas: list[Delta] = []
        while not isinstance(item, BaseException):
            if item is not None:
                deltas.append(item)
                self._num_unfinished -= item.finish_reason is not None
            if self._queue.empty():
                if deltas and self._silence is not None:
                    self._silence.broken()
                return deltas
            item = self._queue.get_nowait()
        # What came before the failure is delivered before it is.
        self._failure = self._as_error(item)
        if deltas:
            return deltas
        raise self._failure

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            if not self._closing:
                self._queue.put_nowait(InternalError("a choice was cancelled from inside"))
        elif error := task.exception():
            self._queue.put_nowait(error)

    def _as_error(self, error: BaseException) -> BatonError:
        if isinstance(error, BatonError):
            return error
        request_id = self._runs[0].choice.request_id
        _log.error("request %s: a choice crashed", request_id, exc_info=error)
        return InternalError("the gateway failed; its log says why under this request's id")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        if self._silence is not None:
            self._silence.close()
        try:
            if kind is None and self._num_unfinished == 0:
                await asyncio.wait(self._tasks, timeout=_CLOSING_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
