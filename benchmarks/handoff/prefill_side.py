"""The prefill process: a pool of random KV, a real KvSender for each transport, and the sending
rank of the bare gloo group. It does what the decode process tells it over a pipe."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc.aio
import numpy as np
from prometheus_client import CollectorRegistry

from baton import rpc
from baton.config import SessionConfig
from baton.errors import ConfigurationError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.protocol import PROTOCOL_VERSION, new_epoch
from baton.telemetry import WorkerMetrics
from baton.worker.engine_thread import SWITCH_INTERVAL_S
from benchmarks.handoff.bare import BareGloo
from benchmarks.handoff.bare_nixl import Address, BareNixl
from benchmarks.handoff.cases import PREFILL_CORE, TRANSFER
from benchmarks.handoff.processes import Memory, pin
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.service import KvSender

SECRET = "a-secret-of-the-benchmark"
WORKER_ID = "prefill-0"
_FIRST_TOKEN = 77


@dataclass(frozen=True, slots=True)
class Serving:
    """What the decode process must know of one transport's sender; ``absent`` says why it
    cannot work here."""

    address: str
    epoch: bytes
    absent: str = ""


def digest_of(layout: KvLayout) -> bytes:
    return layout.digest(
        weights_revision="benchmark", generation="0", protocol_version=PROTOCOL_VERSION
    )


class PrefillSide:
    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout
        self.memory = KvMemory(layout.num_bytes)
        rng = np.random.default_rng(1)
        words = np.frombuffer(self.memory.buffer, dtype=np.uint64)
        for part in np.array_split(words, 64):
            part[:] = rng.integers(0, 1 << 63, len(part), dtype=np.uint64)
        self._senders: dict[str, KvSender] = {}
        self._servers: list[grpc.aio.Server] = []
        self._bare: BareGloo | None = None
        self._bare_nixl: BareNixl | None = None

    async def serve(self, transport: str) -> Serving:
        epoch = new_epoch()
        sender = KvSender(
            worker_id=WORKER_ID,
            epoch=epoch,
            digest=digest_of(self._layout),
            generation="0",
            layout=self._layout,
            memory=self.memory,
            secret=SECRET,
            config=TRANSFER.model_copy(update={"transport": transport}),
            metrics=WorkerMetrics(CollectorRegistry(), worker_id=WORKER_ID, role="prefill"),
            faults=Faults(None, WORKER_ID),
            on_freed=lambda key, outcome: None,
        )
        server = rpc.server(SECRET, SessionConfig())
        sender.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        try:
            await sender.start()
        except ConfigurationError as error:
            return Serving("", epoch, error.message)
        await server.start()
        self._senders[transport] = sender
        self._servers.append(server)
        return Serving(f"127.0.0.1:{port}", epoch)

    def offer(self, transport: str, keys: Sequence[TransferKey], tokens: int) -> None:
        for key in keys:
            self._senders[transport].offer(key, start_token=0, num_tokens=tokens)

    def commit(
        self, transport: str, keys: Sequence[TransferKey], tokens: int, blocks: list[list[int]]
    ) -> list[float]:
        """Announces each whole and commits it; returns when, on the clock that both processes
        share."""
        sender = self._senders[transport]
        committed_at = []
        for key, own in zip(keys, blocks, strict=True):
            committed_at.append(time.monotonic())
            sender.ready(key, tokens, own)
            sender.commit(key, _FIRST_TOKEN, tokens)
        return committed_at

    def join_bare(self, store: str) -> None:
        self._bare = BareGloo(self._layout, self.memory.buffer, store=store, rank=0)

    def send_bare(self, blocks: Sequence[int], *, contiguous: bool) -> float:
        """Returns when it began."""
        assert self._bare is not None
        began_at = time.monotonic()
        if contiguous:
            self._bare.send_contiguous(len(blocks))
        else:
            self._bare.send_scattered(blocks)
        return began_at

    def serve_bare_nixl(self) -> Address:
        """By which the decode process connects."""
        self._bare_nixl = BareNixl(self._layout, self.memory, name="bare/prefill", serves=True)
        return self._bare_nixl.address

    async def close(self) -> None:
        if self._bare_nixl is not None:
            self._bare_nixl.close()
        for sender in self._senders.values():
            await sender.close()
        for server in self._servers:
            await server.stop(None)


def run(connection: Connection, layout: KvLayout) -> None:
    """The process: until the other end of the pipe is closed."""
    pin(PREFILL_CORE)
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in workers
    asyncio.run(_run(connection, PrefillSide(layout)))


async def _run(connection: Connection, side: PrefillSide) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Queue[None] = asyncio.Queue()
    loop.add_reader(connection.fileno(), readable.put_nowait, None)
    connection.send(Memory.of(side.memory))
    try:
        while True:
            await readable.get()
            while connection.poll():
                name, arguments, named = connection.recv()
                answer: Any = getattr(side, name)(*arguments, **named)
                connection.send(await answer if asyncio.iscoroutine(answer) else answer)
    except EOFError:
        loop.remove_reader(connection.fileno())
        await side.close()
