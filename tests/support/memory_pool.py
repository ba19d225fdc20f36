"""Workers whose Sessions run over a stream in memory: a test holds the other end, and
chooses the order of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc.aio

from baton.config import SessionConfig
from baton.protocol import new_epoch
from baton.records import Role
from baton.v1 import session_pb2 as pb
from router.routing.kv_index import KvIndex
from router.workers.handshake import Call
from router.workers.session import WorkerSession
from tests.support.fake_worker import worker_record


class MemoryCall:
    """The gateway's end of a Session whose other end the test holds."""

    def __init__(self) -> None:
        self.written: list[pb.GatewayMessage] = []
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()

    async def write(self, message: pb.GatewayMessage) -> None:
        self.written.append(message)

    async def read(self) -> Any:
        return await self.inbox.get()

    def cancel(self) -> None:
        pass


@dataclass(eq=False)
class Worker:
    """One worker: its Session, and the streams that it believes to be open."""

    role: Role
    number: int
    call: MemoryCall = field(default_factory=MemoryCall)

    def __post_init__(self) -> None:
        record = worker_record(f"{self.role}-{self.number}", self.role, new_epoch())
        config = SessionConfig(silence_s=3600.0)
        index = KvIndex(asyncio.get_running_loop().time)
        self.session = WorkerSession(
            record, cast(Call, self.call), config, kv_dtype="float32", index=index
        )
        self.running = asyncio.create_task(self.session.run())

    def opens(self) -> list[pb.Open]:
        """All that were ever opened: late events are part of the game."""
        return [m.open for m in self.call.written if m.WhichOneof("body") == "open"]

    def send(self, **events: Any) -> None:
        self.call.inbox.put_nowait(pb.WorkerMessage(events=pb.Events(**events)))


class Pool:
    """As the orchestrator sees a WorkerPool, without ports."""

    def __init__(self) -> None:
        self.workers = [Worker(role, n) for n in range(2) for role in ("prefill", "decode")]
        self.watchers: list[asyncio.Event] = []

    def sessions(self, role: Role) -> list[WorkerSession]:
        sessions = [w.session for w in self.workers if w.role == role]
        return [s for s in sessions if s.lost is None and not s.draining]

    def recent_max_model_len(self) -> int | None:
        return max((w.record.max_model_len for w in self.sessions("decode")), default=None)

    @contextmanager
    def watched_by(self, event: asyncio.Event) -> Iterator[None]:
        self.watchers.append(event)
        try:
            yield
        finally:
            self.watchers.remove(event)

    def restart(self, number: int) -> None:
        """The worker dies; another process takes its place."""
        old = self.workers[number]
        old.call.inbox.put_nowait(grpc.aio.EOF)
        self.workers[number] = Worker(old.role, old.number)
        for event in self.watchers:
            event.set()
