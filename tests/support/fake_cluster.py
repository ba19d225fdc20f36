"""The gateway's side of a cluster, from the orchestrator down, over scripted workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from baton.config import BatonConfig, parse_config
from baton.faults import Faults
from baton.logprobs import TokenLogprobs
from baton.protocol import new_epoch
from baton.records import Role, WorkerRecord
from baton.telemetry import GatewayMetrics
from router.orchestrator import Orchestrator
from router.request import ChoiceOutput, ChoiceRequest, SamplingParams
from router.routing.input_hashes import BlockNames
from router.routing.kv_index import KvIndex
from router.routing.policy import PeerShare, RoutingPolicy, make_policy
from router.workers.handshake import GatewayIdentity
from router.workers.pool import WorkerPool
from tests.support.fake_worker import (
    DIGEST,
    MODEL,
    SECRET,
    FakeWorker,
    Script,
    Scripts,
    worker_record,
)

IDENTITY = GatewayIdentity(gateway_id="gateway-0", generation="0", model=MODEL, secret=SECRET)


NAMES = BlockNames(secret=SECRET, weights_revision="revision")


async def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Lets the event loop run until ``condition`` holds; fails when it never does."""
    try:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


def choice(
    *prompt: int, max_tokens: int = 4, deadline_s: float = 30.0, stop: frozenset[int] = frozenset()
) -> ChoiceRequest:
    """A choice with a deadline from now on; only to be made while a loop runs."""
    return ChoiceRequest(
        request_id="request-1",
        choice_index=0,
        prompt_token_ids=prompt or (1, 2, 3),
        sampling=SamplingParams(seed=7, temperature=0.0, top_p=1.0, top_k=0),
        max_tokens=max_tokens,
        stop_token_ids=stop,
        deadline=asyncio.get_running_loop().time() + deadline_s,
        traceparent="00-trace-span-01",
        cache_salt="salt",
    )


class Client:
    """Reads a choice's outputs in a task of its own; what has come is in ``token_ids``."""

    def __init__(self, outputs: AsyncGenerator[ChoiceOutput, None]) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.last: ChoiceOutput | None = None
        self._outputs = outputs
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for output in self._outputs:
                self.token_ids += output.token_ids
                self.logprobs += output.logprobs
                self.last = output
        finally:
            await self._outputs.aclose()

    async def end(self) -> ChoiceOutput:
        """The last output. Raises what the choice failed with."""
        await self.task
        assert self.last is not None
        assert self.last.finish_reason is not None
        return self.last

    async def leave(self) -> None:
        """Goes away in the middle of it."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class FakePeers:
    """Other gateways, whose load a test makes up."""

    def __init__(self) -> None:
        self.up = True
        self.shares: dict[bytes, PeerShare] = {}
        self.told: list[tuple[bytes, int, int]] = []

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        self.told.append((epoch, num_tokens, num_blocks))

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        return self.shares.get(epoch, PeerShare())


class FakeCluster:
    """A pool with an orchestrator on it; workers are added, and die, as a test likes."""

    def __init__(self, config: BatonConfig, policy: RoutingPolicy | None = None) -> None:
        self.registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self.registry)
        self.scripts = Scripts()
        self.workers: list[FakeWorker] = []
        self.peers = FakePeers()
        self.gateways: tuple[str, ...] = ()
        self.prefill_wanted: bool | None = None
        clock = asyncio.get_running_loop().time
        self.index = KvIndex(clock)
        self.pool = WorkerPool(
            identity=IDENTITY,
            config=config.session,
            registry=config.registry,
            metrics=self.metrics,
            index=self.index,
            clock=clock,
        )
        self.orchestrator = Orchestrator(
            config=config,
            pool=self.pool,
            policy=policy
            or make_policy(config.routing, self.index, random.Random(1), clock, self.peers),
            metrics=self.metrics,
            faults=Faults(None, "gateway-0"),
            registry_up=lambda: True,
            rng=random.Random(1),
            names=NAMES if config.routing.policy == "kv_aware" else None,
            prefill_wanted=lambda: self.prefill_wanted,
            gateways=lambda: self.gateways,
            peers=self.peers,
            peers_up=lambda: self.peers.up,
        )
        self._records: dict[str, WorkerRecord] = {}

    async def add(
        self,
        worker_id: str,
        role: Role,
        script: Script | None = None,
        *,
        digest: bytes = DIGEST,
        max_model_len: int = 2048,
    ) -> FakeWorker:
        """Starts a worker, lists it, and waits until its Session is live."""
        worker = FakeWorker(
            worker_id, role, script=script, digest=digest, max_model_len=max_model_len
        )
        await worker.start()
        self.workers.append(worker)
        self._records[worker_id] = worker.record
        self.pool.update(self._records)
        await wait_until(lambda: self.is_live(worker), f"{worker_id} is live")
        return worker

    async def add_pair(self) -> tuple[FakeWorker, FakeWorker]:
        """A prefill and a decode worker, both in the test's hands."""
        return await self.add("prefill-0", "prefill"), await self.add("decode-0", "decode")

    def ask(self, request: ChoiceRequest) -> Client:
        return Client(self.orchestrator.generate(request))

    def replace(self, worker: FakeWorker) -> None:
        """The registry lists another process, which nobody ever reaches, under its name."""
        epoch = new_epoch()
        self._records[worker.worker_id] = worker_record(worker.worker_id, worker.role, epoch)
        self.pool.update(self._records)

    def is_live(self, worker: FakeWorker) -> bool:
        epoch = worker.epoch.hex()
        return any(link.ready for link in self.pool.links if link.record.epoch == epoch)

    def num_open(self) -> int:
        """Streams in the tables of all live Sessions."""
        sessions = [link.session for link in self.pool.links]
        return sum(session.num_open for session in sessions if session is not None)

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def fake_cluster(
    *, policy: RoutingPolicy | None = None, **settings: Any
) -> AsyncIterator[FakeCluster]:
    """``settings`` are the configuration's sections, with a policy that tests can foresee
    unless they name or bring one. Ends with every table empty, or fails."""
    settings = {"routing": {"policy": "least_loaded"}} | settings
    session = {"report_s": 0.05} | settings.pop("session", {})
    cluster = FakeCluster(parse_config({"session": session} | settings), policy)
    try:
        yield cluster
        await wait_until(lambda: cluster.num_open() == 0, "no stream is left in a table")
        assert not cluster.pool._watchers
    finally:
        await cluster.pool.close()
        for worker in cluster.workers:
            await worker.stop()
