"""A pool controller over fakes, on a clock that a test moves."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry
from support.fake_pools import FakeBackend, FakeClock
from support.fake_store import FakeStore

from baton.config import parse_config
from baton.records import PoolWishes
from baton.telemetry import ControllerMetrics
from cluster.controller import PoolController
from cluster.slots import WorkerEvent

SETTINGS: dict[str, Any] = {
    "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 2, "max_replicas": 8}},
    # Longer than any test: what looks at Redis is called by the tests.
    "registry": {"poll_s": 3600, "heartbeat_s": 1, "ttl_s": 5},
    "cluster": {"fence_s": 7200},
}


class ControllerRig:
    """Made inside an event loop; ``close`` it."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.config = parse_config(settings or SETTINGS)
        self.clock = FakeClock()
        self.backend = FakeBackend()
        self.store = FakeStore()
        self.events: list[WorkerEvent] = []
        self.samples = CollectorRegistry()
        self.is_sole = True
        self.controller = self.another()

    def another(self) -> PoolController:
        store: Any = self.store
        self.samples = CollectorRegistry()
        self.controller = PoolController(
            self.config,
            backend=self.backend,
            store=store,
            metrics=ControllerMetrics(self.samples),
            on_event=self.events.append,
            clock=self.clock,
            is_sole=lambda: self.is_sole,
        )
        return self.controller

    async def settle(self) -> None:
        """Everything that follows without time passing."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def begin(self, *, anew: bool = False) -> None:
        await self.controller.begin(anew=anew)
        await self.settle()

    async def wish(self, **sizes: Any) -> None:
        await self.controller.wish(sizes)
        await self.settle()

    def register_all(self) -> None:
        for worker_id in self.backend.running():
            self.store.register(worker_id)

    def running(self) -> list[str]:
        return sorted(self.backend.running())

    def stored(self) -> dict[str, int]:
        assert self.store.wishes is not None
        wishes = PoolWishes.model_validate_json(self.store.wishes)
        return {name: wish.replicas for name, wish in wishes.pools.items()}

    def metric(self, name: str, **labels: str) -> float:
        value = self.samples.get_sample_value(name, labels)
        assert value is not None, f"no sample {name} {labels}"
        return value

    async def close(self) -> None:
        hurry = asyncio.Event()
        hurry.set()
        self.backend.heeds_stop = self.backend.heeds_kill = True
        await self.controller.stop_workers(limit_s=0, hurry=hurry)
        await self.settle()
