"""Both ends of a hand-off in one event loop, with real gRPC and real memory between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from baton import rpc
from baton.config import KvTransferConfig, SessionConfig
from baton.errors import BatonError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.logprobs import TokenLogprobs
from baton.protocol import PROTOCOL_VERSION, new_epoch
from baton.telemetry import WorkerMetrics
from kv_transfer.client import KvReceiver
from kv_transfer.gpu_memory import GpuMemory
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.service import KvSender
from tests.support.cuda_standin import gpu_pool

SECRET = "a-secret-of-the-tests"
SESSION = SessionConfig()
LAYOUT = KvLayout(
    num_blocks=12, num_kv_heads=3, num_layers=2, block_size=4, head_dim=8, dtype="bfloat16"
)
Pool = npt.NDArray[np.uint8]


def no_faults(worker_id: str) -> Faults:
    return Faults(None, worker_id)


class FaultsAt(Faults):
    """Runs a function at a fault point, in whatever thread hits it."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        super().__init__(None, "test")
        self.actions = {name.replace("_", ".", 1): action for name, action in actions.items()}

    def named(self, old: str, new: str) -> FaultsAt:
        renamed = FaultsAt()
        for point, action in self.actions.items():
            room, _, name = point.partition(".")
            if room == new:
                renamed.actions[f"{old}.{name}"] = action
        return renamed

    def hit(self, point: str) -> None:
        if point in self.actions:
            self.actions[point]()

    async def wait(self, point: str) -> None:
        if point in self.actions:
            result = self.actions[point]()
            if asyncio.iscoroutine(result):
                await result


def digest_of(layout: KvLayout, *, weights: str = "w1", generation: str = "0") -> bytes:
    return layout.digest(
        weights_revision=weights, generation=generation, protocol_version=PROTOCOL_VERSION
    )


class PoolMemory:
    """A pool filled with random bytes, seen token by token; ``on_gpu``: on the one that the test
    has a stand-in for."""

    def __init__(self, layout: KvLayout, seed: int, *, on_gpu: bool = False) -> None:
        self.layout = layout
        self.memory: KvMemory | GpuMemory
        flat: Pool
        if on_gpu:
            self.memory, flat = gpu_pool(layout.num_bytes)
        else:
            self.memory = KvMemory(layout.num_bytes)
            flat = np.frombuffer(self.memory.buffer, dtype=np.uint8)
        flat[:] = np.random.default_rng(seed).integers(0, 256, layout.num_bytes, dtype=np.uint8)
        rows = layout.num_kv_heads * layout.num_layers * layout.num_kv_parts
        self.tokens = flat.reshape(layout.num_blocks + 1, rows, layout.block_size, -1)
        self.before = self.tokens.copy()

    def token(self, block_ids: list[int], token: int) -> Pool:
        """Every byte of one token of a sequence."""
        block, slot = divmod(token, self.layout.block_size)
        return self.tokens[block_ids[block], :, slot]


@dataclass
class Prefill:
    """A prefill worker's hand-off, with its server."""

    sender: KvSender
    pool: PoolMemory
    server: grpc.aio.Server
    address: str
    epoch: bytes
    registry: CollectorRegistry
    freed: list[tuple[TransferKey, str]] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        config: KvTransferConfig,
        *,
        layout: KvLayout = LAYOUT,
        secret: str = SECRET,
        digest: bytes | None = None,
        generation: str = "0",
        faults: Faults | None = None,
        port: int = 0,
        epoch: bytes | None = None,
        seed: int = 1,
        on_gpu: bool = False,
    ) -> Prefill:
        pool, epoch, registry = (
            PoolMemory(layout, seed, on_gpu=on_gpu or config.transport == "cuda_ipc"),
            epoch or new_epoch(),
            CollectorRegistry(),
        )
        freed: list[tuple[TransferKey, str]] = []
        sender = KvSender(
            worker_id="prefill-0",
            epoch=epoch,
            digest=digest or digest_of(layout),
            generation=generation,
            layout=layout,
            memory=pool.memory,
            secret=secret,
            config=config,
            metrics=WorkerMetrics(registry, worker_id="prefill-0", role="prefill"),
            faults=faults or no_faults("prefill-0"),
            on_freed=lambda key, outcome: freed.append((key, outcome)),
        )
        server = rpc.server(secret, SESSION)
        sender.register(server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await sender.start()
        await server.start()
        return cls(sender, pool, server, f"127.0.0.1:{bound}", epoch, registry, freed)

    async def close(self) -> None:
        await self.sender.close()
        await self.server.stop(None)

    def compute(
        self,
        key: TransferKey,
        num_tokens: int,
        block_ids: list[int],
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Announces everything and commits; the pool's random bytes are the KV."""
        self.sender.ready(key, num_tokens, block_ids)
        self.sender.commit(key, 77, 0, logprobs)


@dataclass
class Decode:
    """A decode worker's hand-off, with what its callbacks said."""

    receiver: KvReceiver
    pool: PoolMemory
    epoch: bytes
    registry: CollectorRegistry
    ready: dict[TransferKey, tuple[int, int, int]]
    failed: dict[TransferKey, BatonError]
    drained: list[TransferKey]
    first_logprobs: dict[TransferKey, TokenLogprobs | None]

    @classmethod
    async def start(
        cls,
        config: KvTransferConfig,
        *,
        layout: KvLayout = LAYOUT,
        secret: str = SECRET,
        digest: bytes | None = None,
        generation: str = "0",
        faults: Faults | None = None,
        idle_s: float = 60.0,
        seed: int = 2,
        on_gpu: bool = False,
    ) -> Decode:
        pool, epoch, registry = (
            PoolMemory(layout, seed, on_gpu=on_gpu or config.transport == "cuda_ipc"),
            new_epoch(),
            CollectorRegistry(),
        )
        ready: dict[TransferKey, tuple[int, int, int]] = {}
        failed: dict[TransferKey, BatonError] = {}
        drained: list[TransferKey] = []

        first_logprobs: dict[TransferKey, TokenLogprobs | None] = {}

        def on_ready(
            key: TransferKey,
            token_id: int,
            position: int,
            received: int,
            logprobs: TokenLogprobs | None,
        ) -> None:
            assert key not in ready
            ready[key] = (token_id, position, received)
            first_logprobs[key] = logprobs

        def on_failed(key: TransferKey, error: BatonError) -> None:
            assert key not in failed
            failed[key] = error

        receiver = KvReceiver(
            worker_id="decode-0",
            epoch=epoch,
            digest=digest or digest_of(layout),
            generation=generation,
            layout=layout,
            memory=pool.memory,
            secret=secret,
            config=config,
            session=SESSION,
            metrics=WorkerMetrics(registry, worker_id="decode-0", role="decode"),
            faults=faults or no_faults("decode-0"),
            on_ready=on_ready,
            on_failed=on_failed,
            on_drained=drained.append,
            idle_s=idle_s,
        )
        await receiver.start()
        return cls(receiver, pool, epoch, registry, ready, failed, drained, first_logprobs)

    async def close(self) -> None:
        await self.receiver.close()

    def begin(
        self,
        key: TransferKey,
        prefill: Prefill | PrefillProcess,
        *,
        start_token: int,
        num_tokens: int,
        block_ids: Iterable[int],
    ) -> None:
        self.receiver.begin(
            key,
            address=prefill.address,
            source_worker_id="prefill-0",
            start_token=start_token,
            num_tokens=num_tokens,
            block_ids=list(block_ids),
        )


def key_between(prefill: Prefill | PrefillProcess, decode: Decode, number: int = 1) -> TransferKey:
    return TransferKey(number.to_bytes(16, "little"), 0, prefill.epoch, decode.epoch)


async def until(condition: Callable[[], object], *, within_s: float = 20.0) -> None:
    """Waits for a condition that other tasks bring about."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """The sum over a metric's series that have these labels."""
    return sum(
        sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class PrefillProcess:
    """Another process's prefill side (``tests.support.prefill_process``)."""

    def __init__(self, process: asyncio.subprocess.Process, hello: dict[str, Any]) -> None:
        self.process = process
        self.address: str = hello["address"]
        self.epoch = bytes.fromhex(hello["epoch"])
        self.pid: int = hello["pid"]

    @classmethod
    async def start(
        cls, config: KvTransferConfig, *, port: int = 0, faults_file: Path | None = None
    ) -> PrefillProcess:
        environment = dict(os.environ)
        if faults_file is not None:
            environment["BATON_FAULTS_FILE"] = str(faults_file)
        arguments = json.dumps(config.model_dump() | {"port": port})
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.prefill_process", arguments,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        line = await process.stdout.readline()
        assert line, "the prefill process did not start"
        return cls(process, json.loads(line))

    async def tell(self, do: str, key: TransferKey, **values: Any) -> None:
        assert self.process.stdin is not None
        names = [key.transfer_id.hex(), key.destination_epoch.hex()]
        self.process.stdin.write(json.dumps({"do": do, "key": names} | values).encode() + b"\n")
        await self.process.stdin.drain()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP; returns when every thread has stopped, which may do much in between."""
        self.signal(signal.SIGSTOP)
        until_at = time.monotonic() + 10
        while (states := self._thread_states()) != {"T"}:
            assert not states & {"X", "Z"}, "the process has ended"
            assert time.monotonic() < until_at, "the process does not stop"
            time.sleep(0.0005)

    def _thread_states(self) -> set[str]:
        """Letters of ``proc(5)``."""
        states = set()
        for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                states.add(path.read_text().rpartition(")")[2].split()[0])
        return states

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()
