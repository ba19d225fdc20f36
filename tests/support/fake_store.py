"""A Redis in memory for the pool controller: what it stores, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import UnavailableError
from baton.records import PoolWishes
from cluster.controller_store import Registered, RegistryRead


class FakeStore:
    """Stands in for ``ControllerStore``."""

    def __init__(self) -> None:
        self.up = True
        self.server = "redis-1"
        self.workers: dict[str, Registered] = {}
        self.wishes: bytes | None = None
        self.served: frozenset[str] = frozenset()

    def _ask(self) -> None:
        if not self.up:
            raise UnavailableError("Redis does not answer: it is away")

    async def read(self, worker_ids: Sequence[str]) -> RegistryRead:
        self._ask()
        found = {name: self.workers[name] for name in worker_ids if name in self.workers}
        return RegistryRead(self.server, found, self.wishes, self.served)

    async def write_served(self, names: frozenset[str]) -> None:
        self._ask()
        self.served = names

    async def read_wishes(self) -> PoolWishes | None:
        self._ask()
        return PoolWishes.model_validate_json(self.wishes) if self.wishes else None

    async def write_wishes(self, wishes: bytes) -> None:
        self._ask()
        self.wishes = wishes

    def register(self, worker_id: str, epoch: str = "a", generation: str = "0") -> None:
        self.workers[worker_id] = Registered(epoch, 5.0, generation)
