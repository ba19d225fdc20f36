"""A choice that waits for room on one decode worker while another has it, on a fake clock."""

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
from router.choice_run import ROOM_MOVE_PAUSE_S, ROOM_PATIENCE_S
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

    async def ask(self) -> Client:
        request = choice(*PROMPT, max_tokens=4, deadline_s=100.0)
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


@with_cluster
async def test_choice_that_waits_for_room_moves_to_a_worker_that_has_it(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    await asyncio.sleep(20.0)
    assert other.opens() == [], "both are full"
    report(other, num_free=2, num_cached=2)
    await asyncio.sleep(1.0)
    (first,), (second,) = full.opens(), other.opens()
    assert cancels(full) == [first.stream_id]
    assert first.stream_id in [n for w in cluster.workers("prefill") for n in cancels(w)]
    assert second.handoff.decode_epoch == other.session.epoch
    assert second.attempt == 0
    assert cluster.num_moves == 1
    answer(other, second)
    await client.end()
    assert client.token_ids == [50, 51, 52, 53]


@with_cluster
async def test_choice_keeps_its_place_in_line_for_a_moment(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    report(other, num_free=50)
    await asyncio.sleep(ROOM_PATIENCE_S - 0.1)
    assert other.opens() == []
    await asyncio.sleep(0.2)
    assert len(other.opens()) == 1
    await client.leave()
    assert len(full.opens()) == 1


@with_cluster
async def test_choice_that_has_its_room_stays_however_long_prefill_takes(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    (message,) = full.opens()
    full.send(reserved=[pb.Reserved(stream_id=message.stream_id)])
    report(other, num_free=50)
    await asyncio.sleep(30.0)
    assert other.opens() == []
    answer(full, message)
    await client.end()


@with_cluster
async def test_choice_moves_only_where_nobody_waits_and_a_block_is_left_over(
    cluster: Cluster,
) -> None:
    client, _, other = await cluster.ask_full()
    report(other, num_free=50, num_waiting=1)
    await asyncio.sleep(5.0)
    report(other, num_free=2, num_cached=1)
    await asyncio.sleep(5.0)
    assert other.opens() == []
    await client.leave()


@with_cluster
async def test_choice_moves_at_most_once_in_a_while(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    for worker in (full, other):
        report(worker, num_free=50)
    periods = 6
    await asyncio.sleep(ROOM_PATIENCE_S + (periods - 0.5) * ROOM_MOVE_PAUSE_S)
    assert cluster.num_moves == periods
    assert len(full.opens()) + len(other.opens()) == periods + 1
    await client.leave()


@with_cluster
async def test_no_more_choices_move_than_there_is_room_for(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    for worker in cluster.workers("decode"):
        report(worker, num_free=0, num_waiting=1)
    clients = [client, *[await cluster.ask() for _ in range(5)]]
    there = len(other.opens())
    report(other, num_free=7)  # for two of them
    await asyncio.sleep(10.0)
    assert len(other.opens()) == there + 2
    assert cluster.num_moves == 2
    for each in clients:
        await each.leave()
    assert len(full.opens()) + there == 6


@with_cluster
async def test_choice_does_not_leave_a_line_to_join_it_again(cluster: Cluster) -> None:
    client, slow, _ = await cluster.ask_full()
    report(slow, num_free=50)
    await asyncio.sleep(20.0)
    assert cluster.num_moves == 0
    assert len(slow.opens()) == 1
    await client.leave()


@with_cluster
async def test_worker_that_a_choice_moved_from_is_not_shunned(cluster: Cluster) -> None:
    client, full, other = await cluster.ask_full()
    report(other, num_free=50)
    await asyncio.sleep(2.0)
    (moved,) = other.opens()
    busy = Worker("decode", 2)
    cluster.pool.workers.append(busy)
    report(busy, num_free=0, num_waiting=20)
    await asyncio.sleep(0.01)
    leave(other, moved)
    await asyncio.sleep(0.01)
    assert len(full.opens()) == 2
    assert busy.opens() == []
    await client.leave()


@with_cluster
async def test_stream_that_has_begun_finds_room_before_those_that_have_not(
    cluster: Cluster,
) -> None:
    client, gone, full = await cluster.ask_full()
    (message,) = gone.opens()
    batch = pb.TokenBatch(stream_ids=[message.stream_id], positions=[0], token_ids=[50])
    gone.send(tokens=batch)
    report(gone, num_free=0, num_waiting=20)
    await asyncio.sleep(0.01)
    fresh = [await cluster.ask() for _ in range(4)]  # they look every half second from here on
    assert len(full.opens()) == 4
    await asyncio.sleep(0.2)
    leave(gone, message)
    await asyncio.sleep(0.01)
    cluster.pool.restart(cluster.pool.workers.index(gone))
    await asyncio.sleep(3.1)
    (replacement,) = [w for w in cluster.workers("decode") if w is not full]
    report(replacement, num_free=4)
    await asyncio.sleep(1.0)
    (moved,) = replacement.opens()
    assert list(moved.emitted_token_ids) == [50]
    answer(replacement, moved)
    await client.end()
    assert client.token_ids == [50, 51, 52, 53]
    for each in fresh:
        await each.leave()
