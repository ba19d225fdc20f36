"""A worker's record in a real Redis: renewed, taken over, lost, given back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
from support.redis_server import RedisServer, redis_server

from baton.config import RegistryConfig
from baton.records import WorkerRecord, worker_key
from baton.worker.registration import Registration

CONFIG = RegistryConfig(cluster="test", heartbeat_s=0.05, ttl_s=0.5)
KEY = worker_key("test", "decode-0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


def record(epoch: str) -> WorkerRecord:
    return WorkerRecord(
        worker_id="decode-0",
        role="decode",
        epoch=epoch,
        protocol_version=1,
        generation="0",
        address="127.0.0.1:1",
        metrics_address="127.0.0.1:2",
        model="m",
        digest="00",
        block_size=16,
        num_blocks=1,
        max_model_len=16,
        pid=1,
        host="h",
        started_at=0.0,
    )


def stored(server: RedisServer) -> WorkerRecord | None:
    with redis.Redis.from_url(server.url) as client:
        raw = client.get(KEY)
    return None if raw is None else WorkerRecord.model_validate_json(raw)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at, what
        await asyncio.sleep(0.02)


async def ended(*registrations: Registration) -> None:
    for registration in registrations:
        await registration.close()


async def test_record_outlives_its_time_to_live_while_it_is_renewed(server: RedisServer) -> None:
    registration = Registration(server.url, record("a"), CONFIG)
    await registration.start()
    await asyncio.sleep(2 * CONFIG.ttl_s)
    assert stored(server) == record("a")
    await registration.close()
    assert stored(server) is None


async def test_newer_process_takes_the_name_and_the_older_one_hears_of_it(
    server: RedisServer,
) -> None:
    old = Registration(server.url, record("old"), CONFIG)
    await old.start()
    new = Registration(server.url, record("new"), CONFIG)
    await new.start()
    await asyncio.wait_for(old.lost.wait(), 10)
    await old.close()
    assert stored(server) == record("new")
    assert not new.lost.is_set()
    await new.close()


async def test_process_that_slept_through_its_lease_has_lost_it(server: RedisServer) -> None:
    registration = Registration(server.url, record("a"), CONFIG)
    await registration.start()
    time.sleep(2.5 * CONFIG.ttl_s)  # noqa: ASYNC251 - the whole process sleeps, as when stopped
    await asyncio.wait_for(registration.lost.wait(), 10)
    await registration.close()
    assert stored(server) is None


async def test_redis_that_restarts_empty_gets_the_record_again(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        registration = Registration(server.url, record("a"), CONFIG)
        await registration.start()
        server.stop()
        await asyncio.sleep(3 * CONFIG.ttl_s)
        assert not registration.lost.is_set()
        server.start()
        await until(lambda: stored(server) == record("a"), "registered again")
        assert not registration.lost.is_set()
        await registration.close()


async def test_redis_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        server.stop()
        registration = Registration(server.url, record("a"), CONFIG)
        starting = asyncio.create_task(registration.start(within_s=60))
        await asyncio.sleep(3 * CONFIG.heartbeat_s)
        assert not starting.done()
        server.start()
        await asyncio.wait_for(starting, 30)
        await asyncio.sleep(2 * CONFIG.ttl_s)
        assert stored(server) == record("a"), "it is renewed too"
        await registration.close()


async def test_redis_that_does_not_come_is_not_waited_for_longer_than_the_bound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registration = Registration("redis://127.0.0.1:1", record("a"), CONFIG)
    with pytest.raises(redis.exceptions.ConnectionError):
        await asyncio.wait_for(registration.start(within_s=0.3), 30)
    told = [r.getMessage() for r in caplog.records if "cannot register" in r.getMessage()]
    assert len(told) == 1, "it is told, and once"
    assert told[0].startswith("decode-0 cannot register, trying for 0.3 s")
    await registration.close()


async def test_no_redis_at_the_start_is_an_error() -> None:
    registration = Registration("redis://127.0.0.1:1", record("a"), CONFIG)
    refused: Callable[[], Awaitable[None]] = registration.start
    with pytest.raises(redis.exceptions.ConnectionError):
        await refused()
    await registration.close()
