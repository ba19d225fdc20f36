"""Which workers may be given work after the registry has stopped listing them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from baton.config import RegistryConfig
from baton.protocol import new_epoch
from baton.telemetry import GatewayMetrics
from baton.v1 import session_pb2 as pb
from router.routing.kv_index import KvIndex
from router.workers.pool import RECENT_S, WorkerPool
from tests.support.fake_cluster import IDENTITY, wait_until
from tests.support.fake_worker import SESSION, FakeWorker

CONFIG = RegistryConfig(heartbeat_s=1.0, ttl_s=5.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A pool with one worker that is live and listed."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.worker = FakeWorker("decode-0", "decode")
        self.pool = WorkerPool(
            identity=IDENTITY,
            config=SESSION,
            registry=CONFIG,
            metrics=GatewayMetrics(CollectorRegistry()),
            index=KvIndex(self.clock),
            clock=self.clock,
        )

    def poll(self, *workers: FakeWorker, after_s: float = 0.25) -> None:
        """The registry lists these, that long after it was last read."""
        self.clock.now += after_s
        self.pool.update({worker.worker_id: worker.record for worker in workers})

    @property
    def ready(self) -> bool:
        epoch = self.worker.epoch
        return any(session.epoch == epoch for session in self.pool.sessions("decode"))


@asynccontextmanager
async def rigged() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.worker.start()
    rig.poll(rig.worker)
    try:
        await wait_until(lambda: rig.ready)
        yield rig
    finally:
        await rig.pool.close()
        await rig.worker.stop()


async def test_live_worker_that_redis_has_forgotten_is_used_for_a_lease_longer() -> None:
    async with rigged() as rig:
        rig.poll()
        for _ in range(18):
            rig.poll()
        assert rig.ready
        rig.poll()
        assert not rig.ready
        assert rig.pool.links[0].session is not None  # its streams go on
        rig.poll(rig.worker)
        assert rig.ready
        assert rig.worker.num_sessions == 1


async def test_worker_that_comes_back_in_time_has_its_whole_lease_again() -> None:
    async with rigged() as rig:
        for _ in range(3):
            for _ in range(15):
                rig.poll()
            assert rig.ready
            rig.poll(rig.worker)


async def test_time_without_redis_does_not_count_against_the_forgotten() -> None:
    async with rigged() as rig:
        rig.poll(after_s=600.0)
        assert rig.ready
        rig.poll()
        rig.poll(after_s=600.0)
        assert rig.ready


async def test_worker_that_says_it_is_leaving_is_not_taken_for_forgotten() -> None:
    async with rigged() as rig:
        rig.worker.report = pb.Report(draining=True)
        await wait_until(lambda: rig.pool.links[0].draining)
        rig.poll()
        assert not rig.ready
        # Once its Session is over, nobody looks for it any more.
        rig.worker.end_session()
        await wait_until(lambda: rig.pool.links == [])
        assert rig.worker.num_sessions == 1


async def test_process_that_lost_its_name_to_another_is_not_taken_for_forgotten() -> None:
    async with rigged() as rig:
        successor = FakeWorker("decode-0", "decode")
        rig.poll(successor)
        assert not rig.ready
        assert rig.pool.knows(rig.worker.epoch)
        assert rig.pool.knows(successor.epoch)
        assert not rig.pool.knows(new_epoch())


async def test_dead_worker_that_is_listed_no_more_is_gone_at_once() -> None:
    async with rigged() as rig:
        rig.worker.reporting = False
        await rig.worker.stop()
        await wait_until(lambda: not rig.ready)
        rig.poll()
        await wait_until(lambda: rig.pool.links == [])


async def test_worker_that_was_listed_and_never_reached_is_gone_at_once() -> None:
    async with rigged() as rig:
        nobody = FakeWorker("decode-1", "decode")
        rig.poll(rig.worker, nobody)
        assert len(rig.pool.links) == 2
        rig.poll(rig.worker)
        await wait_until(lambda: len(rig.pool.links) == 1)


async def test_what_a_lost_decode_worker_held_is_known_for_some_minutes() -> None:
    async with rigged() as rig:
        held = rig.worker.record.max_model_len
        assert rig.pool.recent_max_model_len() == held
        await rig.worker.stop()
        await wait_until(lambda: not rig.ready)
        rig.clock.now += RECENT_S - 1
        assert rig.pool.recent_max_model_len() == held
        rig.clock.now += 2
        assert rig.pool.recent_max_model_len() is None


async def test_what_a_decode_worker_holds_counts_while_it_is_ready() -> None:
    async with rigged() as rig:
        rig.clock.now += 2 * RECENT_S
        rig.poll(rig.worker)
        assert rig.pool.recent_max_model_len() == rig.worker.record.max_model_len
