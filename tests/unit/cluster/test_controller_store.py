"""The controller's lease, its records and its wishes in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from support.redis_server import RedisServer, redis_server

from baton.config import RegistryConfig
from baton.errors import ConfigurationError, UnavailableError
from baton.records import PoolWish, PoolWishes, pools_key, worker_key
from cluster.controller_store import ControllerStore, lease_key, served_key
from cluster.lease import Lease

QUICK = RegistryConfig(heartbeat_s=0.05, ttl_s=0.4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def plain(server: RedisServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server.url)
    yield client
    client.close()


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[ControllerStore]:
    store = ControllerStore(server.url, "c")
    yield store
    await store.close()


async def test_registered_workers_are_read_with_what_is_left_of_their_records(
    store: ControllerStore, plain: redis.Redis
) -> None:
    record = '{"epoch": "aa", "generation": "g7", "new": 1}'
    plain.set(worker_key("c", "decode-0"), record, px=5000)
    plain.set(worker_key("c", "decode-1"), "no record at all", px=5000)
    plain.set(worker_key("other", "decode-2"), '{"epoch": "bb"}', px=5000)
    plain.set(pools_key("c"), b"wishes")
    read = await store.read(["decode-0", "decode-1", "decode-2"])
    assert set(read.workers) == {"decode-0", "decode-1"}
    assert (read.workers["decode-0"].epoch, read.workers["decode-0"].generation) == ("aa", "g7")
    assert read.workers["decode-1"].generation == ""
    assert 0 < read.workers["decode-0"].expires_in_s <= 5
    assert read.wishes == b"wishes"
    assert (await store.read([])).server == read.server


async def test_restart_of_redis_shows(server: RedisServer, store: ControllerStore) -> None:
    before = await store.read([])
    server.stop()
    with pytest.raises(UnavailableError, match="Redis does not answer"):
        await store.read([])
    server.start()
    assert (await store.read([])).server != before.server


async def test_redis_that_takes_no_writes_does_not_answer(
    server: RedisServer, store: ControllerStore
) -> None:
    server.refuse_writes(True)
    with pytest.raises(UnavailableError, match="Redis"):
        await store.read(["decode-0"])
    server.refuse_writes(False)
    assert (await store.read(["decode-0"])).workers == {}


async def test_wishes_come_back_as_they_were_stored(store: ControllerStore) -> None:
    assert await store.read_wishes() is None
    wishes = PoolWishes(pools={"decode": PoolWish(role="decode", replicas=3, configured=1)})
    await store.write_wishes(wishes.model_dump_json().encode())
    assert await store.read_wishes() == wishes


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pools": {"decode": 3}}', b"\xff"])
async def test_stored_wishes_that_make_no_sense_are_none(
    store: ControllerStore, plain: redis.Redis, content: bytes
) -> None:
    plain.set(pools_key("c"), content)
    assert await store.read_wishes() is None


async def test_names_of_served_processes_come_back_as_they_were_stored(
    store: ControllerStore, plain: redis.Redis
) -> None:
    assert (await store.read([])).served == frozenset()
    await store.write_served(frozenset({"baton-c/decode-0/1f", "baton-c/decode-1/2e"}))
    assert (await store.read([])).served == {"baton-c/decode-0/1f", "baton-c/decode-1/2e"}
    for content in (b"{", b'{"a": 1}', b"\xff"):
        plain.set(served_key("c"), content)
        assert (await store.read([])).served == frozenset()


def test_malformed_address_is_a_sentence() -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL is malformed"):
        ControllerStore("nowhere", "c")


# --------------------------------------------------------------------- lease


async def test_second_controller_waits_and_enters_when_the_first_gives_back(
    store: ControllerStore,
) -> None:
    first, second = Lease(store, QUICK, "first"), Lease(store, QUICK, "second")
    await first.acquire()
    reasons: list[str] = []
    waiting = asyncio.create_task(second.acquire(reasons.append))
    while not reasons:
        await asyncio.sleep(0.01)
    assert reasons[0] == "another controller has the pools: first"
    assert not waiting.done()
    await first.close()
    await asyncio.wait_for(waiting, 10)
    await second.close()


async def test_second_controller_takes_over_once_the_lease_of_a_dead_one_runs_out(
    store: ControllerStore, plain: redis.Redis
) -> None:
    plain.set(lease_key("c"), "dead", px=300)
    lease = Lease(store, QUICK, "next")
    assert await lease.take() == "another controller has the pools: dead"
    await asyncio.wait_for(lease.acquire(), 10)
    assert plain.get(lease_key("c")) == b"next"
    await lease.close()
    assert plain.get(lease_key("c")) is None


async def test_lease_is_renewed_while_it_is_held(
    store: ControllerStore, plain: redis.Redis
) -> None:
    lease = Lease(store, QUICK, "me")
    await lease.acquire()
    plain.pexpire(lease_key("c"), 100)
    ends_at = asyncio.get_running_loop().time() + 10
    while plain.pttl(lease_key("c")) <= 100:  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < ends_at, "it was never renewed"
        await asyncio.sleep(0.01)
    await lease.close()


async def test_lease_that_somebody_else_has_taken_is_lost_and_left_alone(
    store: ControllerStore, plain: redis.Redis
) -> None:
    lease = Lease(store, QUICK, "sleeper")
    await lease.acquire()
    plain.set(lease_key("c"), "usurper", px=60_000)
    assert "usurper" in await asyncio.wait_for(lease.wait_lost(), 10)
    await lease.close()
    assert plain.get(lease_key("c")) == b"usurper"


async def test_lease_is_fresh_until_somebody_else_could_have_it(
    server: RedisServer, store: ControllerStore
) -> None:
    now = 100.0
    lease = Lease(store, QUICK, "me", clock=lambda: now)
    assert not lease.fresh
    assert await lease.take() == ""
    now += QUICK.ttl_s * 0.9
    assert lease.fresh
    now += QUICK.ttl_s * 0.2
    assert not lease.fresh
    server.stop()
    with pytest.raises(UnavailableError):
        await lease.take()
    assert not lease.fresh
    server.start()
    assert await lease.take() == ""
    assert lease.fresh


async def test_lease_outlives_an_outage_and_is_written_to_an_empty_redis(
    server: RedisServer, store: ControllerStore, plain: redis.Redis
) -> None:
    lease = Lease(store, QUICK, "me")
    await lease.acquire()
    lost = asyncio.create_task(lease.wait_lost())
    server.stop()
    await asyncio.sleep(3 * QUICK.heartbeat_s)
    server.start()
    ends_at = asyncio.get_running_loop().time() + 10
    while plain.get(lease_key("c")) != b"me":
        assert asyncio.get_running_loop().time() < ends_at, "it was not written again"
        await asyncio.sleep(0.01)
    assert not lost.done()
    lost.cancel()
    await lease.close()
