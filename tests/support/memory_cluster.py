"""Two pairs of workers in memory under an orchestrator, on a fake clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import cast

from prometheus_client import CollectorRegistry

from baton.config import parse_config
from baton.faults import Faults
from baton.records import Role
from baton.telemetry import GatewayMetrics
from baton.v1 import session_pb2 as pb
from router.orchestrator import Orchestrator
from router.routing.kv_index import KvIndex
from router.routing.policy import make_policy
from router.workers.pool import WorkerPool
from tests.support.fake_cluster import Client, choice
from tests.support.memory_pool import Pool, Worker
from tests.support.skipping_loop import run_skipping

PROMPT = tuple(range(40))  # three blocks


class Cluster:
    """Two pairs of workers; a choice may make one attempt."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.registry = CollectorRegistry()
        config = parse_config(
            {"gateway": {"max_attempts": 1}, "routing": {"policy": "least_loaded"}}
        )
        clock = asyncio.get_running_loop().time
        self.orchestrator = Orchestrator(
            config=config,
            pool=cast(WorkerPool, self.pool),
            policy=make_policy(config.routing, KvIndex(clock), random.Random(0), clock),
            metrics=GatewayMetrics(self.registry),
            faults=Faults(None, "gateway-0"),
            registry_up=lambda: True,
            rng=random.Random(0),
        )

    def workers(self, role: Role) -> list[Worker]:
        return [worker for worker in self.pool.workers if worker.role == role]

    def hold(self, worker: Worker, max_model_len: int) -> None:
        """From now on the worker's record says so, and whoever waits for a worker looks."""
        record = worker.session.record
        worker.session.record = record.model_copy(update={"max_model_len": max_model_len})
        for event in self.pool.watchers:
            event.set()

    async def ask(self, *prompt: int) -> Client:
        request = choice(*(prompt or PROMPT), max_tokens=4, deadline_s=100.0)
        client = Client(self.orchestrator.generate(request))
        await asyncio.sleep(0.01)
        return client

    async def ask_full(self) -> tuple[Client, Worker, Worker]:
        """A choice, the decode worker that it waits on, and the other one; both are full."""
        for worker in self.workers("decode"):
            report(worker, num_free=0, num_waiting=1)
        client = await self.ask()
        first, second = self.workers("decode")
        return (client, first, second) if first.opens() else (client, second, first)

    @property
    def num_moves(self) -> float:
        name = "baton_attempts_total"
        return self.registry.get_sample_value(name, {"cause": "room_elsewhere"}) or 0.0

    async def close(self) -> None:
        for worker in self.pool.workers:
            worker.running.cancel()


def report(worker: Worker, *, num_free: int, num_cached: int = 0, num_waiting: int = 0) -> None:
    counts = pb.BlockCounts(free=num_free, cached=num_cached)
    message = pb.Report(num_waiting=num_waiting, blocks=counts, num_opens=len(worker.opens()))
    worker.call.inbox.put_nowait(pb.WorkerMessage(report=message))


def cancels(worker: Worker) -> list[int]:
    written = worker.call.written
    return [m.cancel.stream_id for m in written if m.WhichOneof("body") == "cancel"]


def answer(worker: Worker, message: pb.Open) -> None:
    """The rest of the stream, in one message."""
    positions = range(len(message.emitted_token_ids), 4)
    batch = pb.TokenBatch(
        stream_ids=[message.stream_id] * len(positions),
        positions=positions,
        token_ids=[50 + position for position in positions],
    )
    closed = pb.Closed(stream_id=message.stream_id, reason=pb.CLOSE_REASON_LENGTH)
    worker.send(tokens=batch, closed=[closed])


def leave(worker: Worker, message: pb.Open) -> None:
    """The worker goes away and lets the stream go on elsewhere."""
    reason = pb.CLOSE_REASON_FAILED
    closed = pb.Closed(stream_id=message.stream_id, reason=reason, error_code="draining")
    worker.send(closed=[closed])


def with_cluster(test: Callable[[Cluster], Awaitable[None]]) -> Callable[[], None]:
    """Ends with every table empty, or fails."""

    async def main() -> None:
        cluster = Cluster()
        await test(cluster)
        await asyncio.sleep(0.01)
        assert sum(worker.session.num_open for worker in cluster.pool.workers) == 0
        await cluster.close()

    @wraps(test)
    def run() -> None:
        run_skipping(main())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would look for fixtures
    return run
