"""The gateway's view of the registry, on a real Redis, and what the pool makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio
from prometheus_client import CollectorRegistry

from baton.config import RegistryConfig
from baton.records import (
    PoolWish,
    PoolWishes,
    WorkerRecord,
    gateway_key,
    index_key,
    pools_key,
    worker_key,
)
from baton.telemetry import GatewayMetrics
from baton.worker.registration import Registration
from router.routing.kv_index import KvIndex
from router.workers.pool import WorkerPool
from router.workers.registry import Registry
from router.workers.view import cluster_status
from tests.support.fake_cluster import IDENTITY, wait_until
from tests.support.fake_worker import SESSION, FakeWorker
from tests.support.redis_server import RedisServer, redis_server

CONFIG = RegistryConfig(poll_s=0.02, heartbeat_s=0.05, ttl_s=1.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


class View:
    """A registry with the pool behind it, as a gateway has them."""

    def __init__(self, url: str) -> None:
        self.samples = CollectorRegistry()
        metrics = GatewayMetrics(self.samples)
        clock = asyncio.get_running_loop().time
        index = KvIndex(clock)
        self.pool = WorkerPool(
            identity=IDENTITY,
            config=SESSION,
            registry=CONFIG,
            metrics=metrics,
            index=index,
            clock=clock,
        )
        self.registry = Registry(
            url, CONFIG, gateway_id="gateway-0", metrics=metrics, on_records=self.pool.update
        )
        self.redis = redis.asyncio.from_url(url)

    async def register(self, record: WorkerRecord) -> None:
        await self.put(worker_key(CONFIG.cluster, record.worker_id), record.model_dump_json())

    async def put(self, key: str, value: str | bytes) -> None:
        """As whoever lives there does: the key, and that it is there."""
        await self.redis.set(key, value)
        await self.redis.sadd(index_key(CONFIG.cluster), key)

    async def deregister(self, worker: FakeWorker) -> None:
        await self.redis.delete(worker_key(CONFIG.cluster, worker.worker_id))

    def known(self) -> list[str]:
        return [link.record.worker_id for link in self.pool.links]

    def ready(self) -> list[str]:
        return [link.record.worker_id for link in self.pool.links if link.ready]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.samples.get_sample_value(name, labels)


@asynccontextmanager
async def viewing(url: str) -> AsyncIterator[View]:
    view = View(url)
    await view.registry.start()
    try:
        yield view
    finally:
        await view.registry.close()
        await view.pool.close()
        await view.redis.aclose()


@asynccontextmanager
async def started(*workers: FakeWorker) -> AsyncIterator[None]:
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.stop()


async def test_records_that_expire_in_a_redis_that_takes_no_writes_take_no_worker_out_of_use(
    server: RedisServer,
) -> None:
    decode = FakeWorker("decode-0", "decode")
    async with started(decode), viewing(server.url) as view:
        await view.register(decode.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        await view.redis.pexpire(worker_key(CONFIG.cluster, "decode-0"), 300)
        server.refuse_writes(True)
        await wait_until(lambda: not view.registry.up)
        while await view.redis.exists(worker_key(CONFIG.cluster, "decode-0")):
            await asyncio.sleep(0.02)
        await asyncio.sleep(CONFIG.ttl_s + 10 * CONFIG.poll_s)
        assert view.ready() == ["decode-0"]
        assert not view.registry.up
        server.refuse_writes(False)
        await view.register(decode.record)
        await wait_until(lambda: view.registry.up)
        assert view.ready() == ["decode-0"]


async def test_registered_workers_get_a_session_and_are_counted(server: RedisServer) -> None:
    prefill, decode = FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode")
    async with started(prefill, decode), viewing(server.url) as view:
        await view.register(prefill.record)
        await view.register(decode.record)
        await wait_until(lambda: view.ready() == ["decode-0", "prefill-0"])
        assert [s.record.worker_id for s in view.pool.sessions("decode")] == ["decode-0"]
        assert view.sample("baton_workers", role="decode") == 1
        assert view.sample("baton_workers", role="prefill") == 1
        assert view.sample("baton_registry_up") == 1
        await decode.stop()
        await view.deregister(decode)
        await wait_until(lambda: view.known() == ["prefill-0"])
        assert view.sample("baton_workers", role="decode") == 0


async def test_malformed_records_are_logged_once_and_hide_no_other(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        good = worker.record.model_dump()
        for name, value in {
            "text": b"\xff not json",
            "renamed": json.dumps(good).encode(),
            "unknown": json.dumps(good | {"worker_id": "unknown", "extra": 1}).encode(),
            "epoch": json.dumps(good | {"worker_id": "epoch", "epoch": "abc"}).encode(),
            "short": json.dumps(good | {"worker_id": "short", "epoch": "ab"}).encode(),
        }.items():
            await view.put(worker_key(CONFIG.cluster, name), value)
        await view.register(worker.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        polls = await _num_polls(view)
        while await _num_polls(view) < polls + 3:
            await asyncio.sleep(CONFIG.poll_s)
        assert view.known() == ["decode-0"]
        complaints = [r for r in caplog.records if "malformed" in r.message]
        assert len(complaints) == 5


async def _num_polls(view: View) -> int:
    info = await view.redis.info("commandstats")
    return int(info["cmdstat_smembers"]["calls"])


async def test_redis_away_keeps_what_is_known_and_cuts_nothing(server: RedisServer) -> None:
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        await view.register(worker.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        server.stop()
        await wait_until(lambda: not view.registry.up)
        assert view.sample("baton_registry_up") == 0
        assert view.ready() == ["decode-0"]
        status = cluster_status(view.pool, registry_up=view.registry.up, prefill_wanted=False)
        assert status.ready
        assert "Redis" in status.degraded[0]
        worker.end_session()  # a Session that is lost meanwhile comes back
        await wait_until(lambda: worker.num_sessions == 2 and view.ready() == ["decode-0"])
        # Redis is back, empty: whoever lives is as good as before.
        server.start()
        await wait_until(lambda: view.registry.up)
        assert view.known() == view.ready() == ["decode-0"]
        await view.redis.connection_pool.disconnect()
        await view.register(worker.record)
        polls = await _num_polls(view)
        while await _num_polls(view) < polls + 3:
            await asyncio.sleep(CONFIG.poll_s)
        assert view.ready() == ["decode-0"]
        assert worker.num_sessions == 2


async def test_gateway_without_redis_from_the_start_finds_it_later(server: RedisServer) -> None:
    server.stop()
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        assert not view.registry.up
        server.start()
        await view.register(worker.record)
        await wait_until(lambda: view.ready() == ["decode-0"])


async def test_new_epoch_under_an_old_name_gets_a_session_of_its_own(server: RedisServer) -> None:
    old, new = FakeWorker("decode-0", "decode"), FakeWorker("decode-0", "decode")
    async with started(old, new), viewing(server.url) as view:
        await view.register(old.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        await view.register(new.record)
        await wait_until(lambda: new.num_sessions == 1 and view.ready() == ["decode-0"])
        (session,) = view.pool.sessions("decode")
        assert session.epoch == new.epoch
        assert view.known() == ["decode-0", "decode-0"]  # the old one may still be finishing
        await old.stop()
        await wait_until(lambda: view.known() == ["decode-0"])
        assert old.num_sessions == 1


async def test_worker_that_is_refused_is_tried_again_while_it_is_listed(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    worker = FakeWorker("decode-0", "decode")
    worker.welcome_changes = {"generation": "other"}
    async with started(worker), viewing(server.url) as view:
        await view.register(worker.record)
        await wait_until(lambda: worker.num_sessions >= 3)
        assert view.ready() == []
        complaints = [r for r in caplog.records if "generation" in r.message]
        assert len(complaints) == 1
        worker.welcome_changes = {}
        await wait_until(lambda: view.ready() == ["decode-0"])
        worker.end_session()
        await view.deregister(worker)
        await wait_until(lambda: view.known() == [])


async def test_gateway_announces_itself_for_as_long_as_it_lives(server: RedisServer) -> None:
    key = gateway_key(CONFIG.cluster, "gateway-0")
    async with viewing(server.url) as view:
        presence = json.loads(await view.redis.get(key) or "")
        assert presence["gateway_id"] == "gateway-0"
        assert 0 < await view.redis.pttl(key) <= 1000
        await view.redis.delete(key)
        while not await view.redis.exists(key):  # the next heartbeat brings it back
            await asyncio.sleep(CONFIG.poll_s)
    client = redis.asyncio.from_url(server.url)
    assert not await client.exists(key)
    await client.aclose()


async def test_wrong_password_is_a_registry_that_does_not_answer(server: RedisServer) -> None:
    async with viewing(server.url.replace("://:", "://:wrong")) as view:
        assert not view.registry.up


async def test_registry_closes_at_any_moment(server: RedisServer) -> None:
    config = RegistryConfig(poll_s=1e-6)
    metrics = GatewayMetrics(CollectorRegistry())
    for num_steps in range(60):
        registry = Registry(
            server.url, config, gateway_id="g", metrics=metrics, on_records=lambda records: None
        )
        await registry.start()
        for _ in range(num_steps % 20):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await registry.close()


def wishes(prefill: int) -> str:
    pools = {
        "prefill": PoolWish(role="prefill", replicas=prefill, configured=1),
        "decode": PoolWish(role="decode", replicas=1, configured=1),
    }
    return PoolWishes(pools=pools).model_dump_json()


async def test_pools_that_are_wished_for_are_known_and_outlive_redis(server: RedisServer) -> None:
    key = pools_key(CONFIG.cluster)
    async with viewing(server.url) as view:
        assert view.registry.wants("prefill") is None
        await view.redis.set(key, wishes(0))
        await wait_until(lambda: view.registry.wants("prefill") is False)
        assert view.registry.wants("decode") is True
        await view.redis.set(key, wishes(2))
        await wait_until(lambda: view.registry.wants("prefill") is True)
        server.stop()
        await wait_until(lambda: not view.registry.up)
        server.start()
        await wait_until(lambda: view.registry.up)
        assert view.registry.wants("prefill") is True


async def test_malformed_wishes_are_logged_once_and_the_last_good_ones_stay(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with viewing(server.url) as view:
        await view.redis.set(pools_key(CONFIG.cluster), wishes(0))
        await wait_until(lambda: view.registry.wants("prefill") is False)
        await view.redis.set(pools_key(CONFIG.cluster), '{"pools": {"prefill": {}}}')
        polls = await _num_polls(view)
        while await _num_polls(view) < polls + 4:
            await asyncio.sleep(CONFIG.poll_s)
        assert view.registry.wants("prefill") is False
        assert len([r for r in caplog.records if "malformed" in r.message]) == 1


async def test_gateways_are_seen_while_they_live(server: RedisServer) -> None:
    async with viewing(server.url) as view:
        assert view.registry.gateways == ("gateway-0",)
        other = gateway_key(CONFIG.cluster, "gateway-1")
        await view.put(other, "{}")
        await wait_until(lambda: view.registry.gateways == ("gateway-0", "gateway-1"))
        assert view.sample("baton_gateways") == 2
        await view.redis.delete(other)
        await wait_until(lambda: view.registry.gateways == ("gateway-0",))


async def test_what_is_not_listed_or_of_another_kind_is_left_alone(server: RedisServer) -> None:
    async with viewing(server.url) as view:
        index = index_key(CONFIG.cluster)
        await view.redis.set("baton:other:gateway:gateway-9", "{}")
        await view.redis.set("unrelated", "1")
        await view.redis.sadd(index, "unrelated")
        key = worker_key(CONFIG.cluster, "a-hash")
        await view.redis.hset(key, "field", "value")
        await view.redis.sadd(index, key)
        polls = await _num_polls(view)
        while await _num_polls(view) < polls + 3:
            await asyncio.sleep(CONFIG.poll_s)
        assert view.registry.up
        assert view.registry.gateways == ("gateway-0",)
        assert view.known() == []


async def test_redis_is_never_searched_however_much_else_is_in_it(server: RedisServer) -> None:
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        await view.register(worker.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        stats = await view.redis.info("commandstats")
        assert "cmdstat_smembers" in stats
        assert not {"cmdstat_scan", "cmdstat_keys"} & stats.keys()


async def test_what_has_expired_is_listed_no_more(server: RedisServer) -> None:
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        await view.register(worker.record)
        await wait_until(lambda: view.ready() == ["decode-0"])
        await worker.stop()
        await view.redis.pexpire(worker_key(CONFIG.cluster, "decode-0"), 1)
        await wait_until(lambda: view.known() == [])
        own = gateway_key(CONFIG.cluster, "gateway-0").encode()
        assert await view.redis.smembers(index_key(CONFIG.cluster)) == {own}


async def test_lost_index_is_soon_whole_again(server: RedisServer) -> None:
    worker = FakeWorker("decode-0", "decode")
    async with started(worker), viewing(server.url) as view:
        registration = Registration(server.url, worker.record, CONFIG)
        await registration.start()
        await wait_until(lambda: view.ready() == ["decode-0"])
        await view.redis.delete(index_key(CONFIG.cluster))
        keys = {
            worker_key(CONFIG.cluster, "decode-0").encode(),
            gateway_key(CONFIG.cluster, "gateway-0").encode(),
        }
        async with asyncio.timeout(10):
            while await view.redis.smembers(index_key(CONFIG.cluster)) != keys:
                await asyncio.sleep(CONFIG.poll_s)
        assert view.ready() == ["decode-0"]
        await registration.close()
        assert await view.redis.smembers(index_key(CONFIG.cluster)) < keys
