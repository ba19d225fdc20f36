"""Whether this gateway serves, and what it is serving.

1. *serving*: from the start.
2. *draining*: ``begin_drain`` -- new requests are refused, running ones go on.
3. *refusing*: ``refuse_running`` -- running ones end with the same refusal.

The process's main moves it, on the event loop; ``wait_idle`` tells when it may exit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from baton.errors import BatonError, DrainingError

_RETRY_AFTER_S = 5.0
"""By then another gateway, or this one started anew, answers."""


class Endable(Protocol):
    """A request that runs and can be ended from outside."""

    def end(self, reason: BatonError) -> None: ...


class Lifecycle:
    """Of one gateway; all on its event loop."""

    def __init__(self) -> None:
        self._draining = False
        self._refusing = False
        self._num_requests = 0
        self._running: set[Endable] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        return self._draining

    def begin_drain(self) -> None:
        self._draining = True

    def refuse_running(self) -> None:
        """Ends every running request with DrainingError; streams get an error event."""
        self._draining = self._refusing = True
        for call in list(self._running):
            call.end(self._refusal())

    async def wait_idle(self) -> None:
        """Until no request is left. The caller bounds it."""
        await self._idle.wait()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request from its first byte to its last. Raises DrainingError when draining."""
        if self._draining:
            raise self._refusal()
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    def add(self, call: Endable) -> None:
        """Raises DrainingError when running requests are being refused."""
        if self._refusing:
            raise self._refusal()
        self._running.add(call)

    def discard(self, call: Endable) -> None:
        self._running.discard(call)

    @staticmethod
    def _refusal() -> DrainingError:
        return DrainingError("this gateway is going away; try again", retry_after_s=_RETRY_AFTER_S)
