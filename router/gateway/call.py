"""The scope in which a request is served: what is inside it ends when the request does.

A request ends early when its deadline runs out, its client leaves or the
gateway refuses what still runs. Each of them cancels the body of the ``async
with``, whose own clean-up runs, and then leaves the scope as its BatonError.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

from baton.errors import BatonError, CancelledError, DeadlineExceededError
from router.gateway.lifecycle import Lifecycle


class Call:
    """Enter it once the request's body is read: it then owns ``receive``."""

    def __init__(self, receive: Receive, *, deadline: float, lifecycle: Lifecycle) -> None:
        """``deadline``: on the event loop's clock."""
        self._receive = receive
        self._lifecycle = lifecycle
        self._timeout = asyncio.timeout_at(deadline)
        self._reason: BatonError | None = None
        self._answered = False

    async def __aenter__(self) -> Call:
        self._lifecycle.add(self)
        await self._timeout.__aenter__()
        self._watcher = asyncio.create_task(self._watch(), name="watch for the client leaving")
        return self

    def end(self, reason: BatonError) -> None:
        """Cancels the body, for ``reason``; without effect once it is ending or answered."""
        if self._answered or self._reason is not None or self._timeout.expired():
            return
        self._reason = reason
        self._timeout.reschedule(asyncio.get_running_loop().time())

    async def answered(self) -> None:
        """To be called just before the answer's last bytes are sent: from now on nothing
        ends the body, and the client's leaving is only natural."""
        if self._reason is not None or self._timeout.expired():
            # The cancellation is on its way; nothing else ends this wait.
            await asyncio.get_running_loop().create_future()
        self._answered = True
        self._timeout.reschedule(None)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(CancelledError("the client left"))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lifecycle.discard(self)
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise self._reason or DeadlineExceededError(
                "the request's deadline ran out before its answer was complete"
            ) from None
        finally:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
