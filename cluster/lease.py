"""One controller at a time: a lease in Redis, renewed while its holder lives.

1. WAITING: somebody else has it. Asked for again every beat.
2. HELD: renewed every beat. While Redis does not answer it stays held: nobody else
   can take it there either, and a Redis that comes back empty is written to anew.
3. LOST: somebody else has taken it over. Whoever held it must end.

A holder that sleeps through its lease may act on its pools once more before it
notices. That does no harm for long: of two workers of one name the later
registration counts, and the other worker ends itself.
"""

from __future__ import annotations

import os
import secrets
import socket

from baton.config import RegistryConfig
from baton.errors import UnavailableError
from cluster.controller_store import ControllerStore


def own_name() -> str:
    """Of this process as a holder: for people to read, and unique."""
    return f"{socket.gethostname()}, pid {os.getpid()} ({secrets.token_hex(4)})"


class Lease:
    """Of one process that wants to control the pools."""

    def __init__(self, store: ControllerStore, config: RegistryConfig, name: str) -> None:
        self._store = store
        self._config = config
        self._name = name
        self._renewed_at = float("-inf")
        self.held = False

    async def take(self) -> str:
        """Asks for it once. Empty when it is held now, else a sentence that says why not."""
        try:
            other = await self._store.take_lease(self._name, self._config.ttl_s)
        except UnavailableError as error:
            return error.message
        self.held = other is None
        return "" if self.held else f"another controller has the pools: {other}"

    async def renew(self, now: float) -> str:
        """Renews it when a beat is due. Empty while it is held, else who has it now.

        Raises UnavailableError when Redis does not answer: it is held still.
        """
        if now - self._renewed_at < self._config.heartbeat_s:
            return ""
        other = await self._store.take_lease(self._name, self._config.ttl_s)
        if other is None:
            self._renewed_at = now
            return ""
        self.held = False
        return f"another controller has taken the pools over: {other}"

    async def give_back(self) -> None:
        """Lets another one in at once. Raises UnavailableError; it expires by itself then."""
        if self.held:
            self.held = False
            await self._store.give_lease_back(self._name)
