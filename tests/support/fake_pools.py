"""A backend, its processes and a clock for tests of what runs pools."""

from __future__ import annotations

import asyncio
import itertools

from baton.errors import UnavailableError
from cluster.backend import Exit


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


_numbers = itertools.count()


class FakeProcess:
    def __init__(self, worker_id: str, *, heeds_stop: bool = True, heeds_kill: bool = True) -> None:
        self.worker_id = worker_id
        self.name = f"{worker_id}/{next(_numbers)}"
        self.heeds_stop = heeds_stop
        self.heeds_kill = heeds_kill
        self.stop_asked = False
        self.num_kills = 0
        self.is_placed = True
        self.end: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Exit:
        return await asyncio.shield(self.end)

    async def stop(self) -> None:
        self.stop_asked = True
        if self.heeds_stop:
            self.die(0, "ended")

    async def kill(self) -> None:
        self.num_kills += 1
        if self.heeds_kill:
            self.die(-9, "was killed")

    @property
    def killed(self) -> bool:
        return self.num_kills > 0

    def die(self, code: int = 1, reason: str = "exited with status 1") -> None:
        if not self.end.done():
            self.end.set_result(Exit(code, reason))


class FakeBackend:
    def __init__(self) -> None:
        self.started: list[FakeProcess] = []
        self.refuse: Exception | None = None
        self.heeds_stop = self.heeds_kill = True
        self.adoptable: dict[str, FakeProcess] = {}
        self.gate: asyncio.Event | None = None
        self.opening: asyncio.Event | None = None
        self.closed_doors: list[str] = []
        """What the next openings fail with."""
        self.num_openings = 0
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, pool: str, worker_id: str) -> FakeProcess:
        if self.gate is not None:
            await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        process = FakeProcess(worker_id, heeds_stop=self.heeds_stop, heeds_kill=self.heeds_kill)
        self.started.append(process)
        return process

    async def open(self) -> None:
        self.num_openings += 1
        if self.opening is not None:
            await self.opening.wait()
        if self.closed_doors:
            raise UnavailableError(self.closed_doors.pop(0))

    async def adopt(self) -> dict[str, FakeProcess]:
        return dict(self.adoptable)

    async def wait_lost(self) -> str:
        return await asyncio.shield(self.lost)

    async def close(self) -> bool:
        return True

    def ids(self) -> list[str]:
        return [process.worker_id for process in self.started]

    def running(self) -> dict[str, FakeProcess]:
        """By worker id, what has not ended: the adopted ones too."""
        everything = [*self.adoptable.values(), *self.started]
        return {p.worker_id: p for p in everything if not p.end.done()}
