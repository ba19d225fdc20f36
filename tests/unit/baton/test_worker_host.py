"""A worker process's life around its engine: what it registers, how it drains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
import redis.asyncio
from prometheus_client import CollectorRegistry
from support.redis_server import RedisServer

from baton.config import BatonConfig, parse_config
from baton.errors import BatonError, ConfigurationError, InternalError
from baton.records import WorkerRecord, worker_key
from baton.worker.engine_thread import EngineThread
from baton.worker.host import Identity, WorkerHost
from baton.worker.inbox import Inbox
from cluster.redis_server import free_port

IDENTITY = Identity(
    worker_id="decode-0",
    role="decode",
    epoch=b"e" * 16,
    model="m",
    digest=b"d" * 16,
    block_size=16,
    num_blocks=4,
    max_model_len=64,
    kv_dtype="float32",
    generation="0",
)


class Worker:
    """Has work until it is told otherwise. ``told`` is what happened, in order."""

    def __init__(self) -> None:
        self.idle = False
        self.told: list[str] = []
        self.dies = False
        self.in_step = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def drain(self) -> None:
        self.told.append("drain")

    def fail_all(self, error: BatonError) -> None:
        self.told.append(error.code)

    def step(self) -> bool:
        """Flushes, as a worker's step does."""
        if self.dies:
            raise ValueError("a fault")
        if self.told and not self.told[-1].startswith("sent"):
            self.told.append(f"sent {self.told[-1]}")
        if not self.go_on.is_set():
            self.in_step.set()
            self.go_on.wait(20)
        return False


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server.url
    server.stop()


def settings(*, hang_s: float = 60.0, **worker: Any) -> BatonConfig:
    return parse_config({"worker": worker, "gateway": {"drain_s": 0}, "engine": {"hang_s": hang_s}})


@asynccontextmanager
async def living(
    worker: Worker, config: BatonConfig, redis_url: str, *, advertise_host: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.Task[None], asyncio.Event, WorkerRecord]]:
    """The host, once its worker is registered: its life, how to stop it, its record."""
    inbox = Inbox(asyncio.get_running_loop())
    host = WorkerHost(
        config=config,
        identity=IDENTITY,
        worker=worker,
        inbox=inbox,
        registry=CollectorRegistry(),
        redis_url=redis_url,
    )
    stop = asyncio.Event()
    run = host.run(grpc.aio.server(), advertise_host=advertise_host, stop=stop)
    life = asyncio.create_task(run)
    client = redis.asyncio.from_url(redis_url)
    while (record := await client.get(worker_key("default", "decode-0"))) is None:
        assert not life.done(), life
        await asyncio.sleep(0.01)
    await client.aclose()
    yield life, stop, WorkerRecord.model_validate_json(record)
    stop.set()
    await asyncio.wait_for(life, 20)


async def test_others_are_told_the_advertised_host_and_the_configured_ports(
    redis_url: str,
) -> None:
    worker, (port, page) = Worker(), (free_port(), free_port())
    worker.idle = True
    config = settings(host="0.0.0.0", port=port, metrics_port=page)
    async with living(worker, config, redis_url, advertise_host="10.9.8.7") as (_, _, record):
        assert record.address == f"10.9.8.7:{port}"
        assert record.metrics_address == f"10.9.8.7:{page}"
        for listening in (port, page):
            _, writer = await asyncio.open_connection("127.0.0.1", listening)
            writer.close()
            await writer.wait_closed()


async def test_port_that_is_taken_is_named(redis_url: str) -> None:
    worker = Worker()
    worker.idle = True
    async with living(worker, settings(), redis_url) as (_, _, record):
        taken = int(record.metrics_address.rpartition(":")[2])
        other = WorkerHost(
            config=settings(metrics_port=taken),
            identity=IDENTITY,
            worker=Worker(),
            inbox=Inbox(asyncio.get_running_loop()),
            registry=CollectorRegistry(),
            redis_url=redis_url,
        )
        server = grpc.aio.server()
        with pytest.raises(ConfigurationError, match=r"worker\.metrics_port: cannot listen on"):
            await other.run(server, advertise_host="h", stop=asyncio.Event())
        await server.stop(None)


def host_of(config: BatonConfig, redis_url: str) -> WorkerHost:
    worker = Worker()
    worker.idle = True
    return WorkerHost(
        config=config,
        identity=IDENTITY,
        worker=worker,
        inbox=Inbox(asyncio.get_running_loop()),
        registry=CollectorRegistry(),
        redis_url=redis_url,
    )


async def test_worker_that_waits_for_redis_to_register_ends_when_it_is_asked_to() -> None:
    stop = asyncio.Event()
    host = host_of(parse_config({"cluster": {"start_timeout_s": 3600}}), "redis://127.0.0.1:1")
    run = host.run(grpc.aio.server(), advertise_host="h", stop=stop)
    life = asyncio.create_task(run)
    await asyncio.sleep(0.5)
    assert not life.done(), "it gave up"
    stop.set()
    await asyncio.wait_for(life, 20)


async def test_worker_that_cannot_register_in_the_time_of_a_start_says_so() -> None:
    host = host_of(parse_config({"cluster": {"start_timeout_s": 0.1}}), "redis://127.0.0.1:1")
    with pytest.raises(ConfigurationError, match=r"cannot register.* 0\.1 s"):
        await host.run(grpc.aio.server(), advertise_host="h", stop=asyncio.Event())


async def test_drain_lasts_as_the_workers_own_bound_says_and_ends_when_it_is_idle(
    redis_url: str,
) -> None:
    worker = Worker()
    async with living(worker, settings(drain_s=3600), redis_url) as (life, stop, _):
        stop.set()
        await asyncio.sleep(0.5)
        assert not life.done(), "the gateway's bound, 0 s, is not the worker's"
        assert "draining" not in worker.told
        worker.idle = True
        await asyncio.wait_for(asyncio.shield(life), 10)


async def test_what_outlasts_the_bound_is_failed_as_draining(redis_url: str) -> None:
    worker = Worker()
    async with living(worker, settings(drain_s=0.2), redis_url) as (life, stop, _):
        stop.set()
        await asyncio.wait_for(asyncio.shield(life), 10)
    assert [told for told in worker.told if "sent" not in told] == ["drain", "draining"]
    assert worker.told[-1] == "sent draining"


async def test_last_answers_wait_for_a_step_that_takes_long(redis_url: str) -> None:
    """They leave with the step after it: the port must not close before."""
    worker = Worker()
    async with living(worker, settings(drain_s=0), redis_url) as (life, stop, _):
        worker.go_on.clear()
        assert await asyncio.to_thread(worker.in_step.wait, 10)
        stop.set()
        await asyncio.sleep(1.0)  # far longer than the last events get to leave
        assert not life.done()
        worker.go_on.set()
        await asyncio.wait_for(asyncio.shield(life), 10)
    assert worker.told[-1] == "sent draining"


@pytest.mark.parametrize("hangs_first", [True, False])
async def test_engine_that_hangs_while_its_worker_leaves_ends_it_at_once(
    redis_url: str, hangs_first: bool
) -> None:
    worker, config = Worker(), settings(drain_s=3600, hang_s=1.0)

    async def hang() -> None:
        worker.go_on.clear()
        assert await asyncio.to_thread(worker.in_step.wait, 10)

    with pytest.raises(InternalError, match=r"the engine died.*no progress for 1 s"):
        async with living(worker, config, redis_url) as (life, stop, _):
            if hangs_first:
                await hang()
            stop.set()
            if not hangs_first:
                while "sent drain" not in worker.told:
                    await asyncio.sleep(0.01)
                await hang()
            await asyncio.wait({life}, timeout=15)
            assert life.done(), "it waits for the end of a drain that nobody can finish"
    worker.go_on.set()


async def test_engine_that_dies_while_its_worker_leaves_ends_it_at_once(redis_url: str) -> None:
    worker = Worker()
    with pytest.raises(InternalError, match="a fault"):
        async with living(worker, settings(drain_s=3600), redis_url) as (life, stop, _):
            stop.set()
            while "sent drain" not in worker.told:
                await asyncio.sleep(0.01)
            worker.dies = True
            await asyncio.wait({life}, timeout=15)
            assert life.done()


async def test_what_fails_outside_the_engine_ends_it_before_it_hears_of_anything_else() -> None:
    loop = asyncio.get_running_loop()
    inbox, died = Inbox(loop), loop.create_future()
    thread = EngineThread(inbox, step=lambda: False, on_fatal=died.set_result)
    thread.start()
    error, heard = OSError("a card is gone"), []
    inbox.fail(error)
    inbox.post(heard.append, "later")
    assert await asyncio.wait_for(died, 10) is error
    thread.stop(timeout_s=10)
    assert not heard


async def test_what_the_event_loop_fails_to_do_for_the_engine_ends_the_worker() -> None:
    loop = asyncio.get_running_loop()
    inbox, died = Inbox(loop), loop.create_future()
    thread = EngineThread(inbox, step=lambda: False, on_fatal=died.set_result)
    thread.start()
    error = KeyError("a transfer that nobody knows")

    def fail() -> None:
        raise error

    inbox.call(fail)
    assert await asyncio.wait_for(died, 10) is error
    thread.stop(timeout_s=10)
