"""One controller at a time: a lease in Redis, renewed while its holder lives.

1. WAITING: somebody else has it, or Redis does not answer. Asked for every beat.
2. HELD: renewed every beat. While Redis does not answer it stays held, for a Redis that
   comes back empty is written to anew; but it is not ``fresh`` once it would have run
   out: Redis may answer somebody else, who has it by then. Nothing is started meanwhile.
3. LOST: somebody else has taken it over. Whoever held it must end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable

from baton.config import RegistryConfig
from baton.errors import UnavailableError
from cluster.controller_store import ControllerStore

logger = logging.getLogger(__name__)


def own_name() -> str:
    """Of this process as a holder: for people to read, and unique."""
    return f"{socket.gethostname()}, pid {os.getpid()} ({secrets.token_hex(4)})"


class Lease:
    """Of one process that wants to control the pools."""

    def __init__(
        self,
        store: ControllerStore,
        config: RegistryConfig,
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._asked_at = float("-inf")
        """When it was asked for the last time that it was given."""
        self._store = store
        self._config = config
        self._name = name
        self._keeping: asyncio.Task[str] | None = None
        self._closed = False
        self._complaint = ""

    @property
    def fresh(self) -> bool:
        """It is ours for sure: nobody can have taken it over by now."""
        return self._clock() < self._asked_at + self._config.ttl_s

    async def take(self) -> str:
        """Asks for it once, to have or to renew it. Empty when it is held now, else who
        has it, in a sentence. Raises UnavailableError when Redis does not answer."""
        asked_at = self._clock()
        other = await self._store.take_lease(self._name, self._config.ttl_s)
        if other is None:
            self._asked_at = asked_at
        return f"another controller has the pools: {other}" if other is not None else ""

    async def acquire(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Returns once it is held; it is kept from then on. ``on_wait`` hears why that
        takes so long, at every beat. Bound it from outside: it waits for ever."""
        while reason := await self._reason():
            self._complain(reason)
            on_wait(reason)
            await asyncio.sleep(self._config.heartbeat_s)
        self._complain("")
        self._keeping = asyncio.create_task(self._keep(), name="lease")

    async def _reason(self) -> str:
        try:
            return await self.take()
        except UnavailableError as error:
            return error.message

    async def _keep(self) -> str:
        # The flag: redis may swallow a cancellation before Python 3.12 (see registration.py).
        while not self._closed:
            await asyncio.sleep(self._config.heartbeat_s)
            try:
                reason = await self.take()
            except UnavailableError as error:
                self._complain(f"{error.message}; the lease is held until somebody else has it")
            else:
                self._complain("")
                if reason:
                    logger.error("%s", reason)
                    return reason
        return "it was given back"

    def _complain(self, complaint: str) -> None:
        if complaint and complaint != self._complaint:
            logger.warning("%s", complaint)
        self._complaint = complaint

    async def wait_lost(self) -> str:
        """Returns once somebody else has taken it over, saying so; it must be held."""
        assert self._keeping is not None
        return await asyncio.shield(self._keeping)

    async def close(self) -> None:
        """Lets another one in at once, if Redis can be told; else it expires. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._keeping is None:
            return
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        try:
            await self._store.give_lease_back(self._name)
        except UnavailableError as error:
            logger.info("could not give the lease back: %s", error.message)
