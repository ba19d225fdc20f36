"""The gateway as a process of its own: how it starts, what it says, how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
import uvloop
import yaml
from fastapi import FastAPI

from baton.errors import ConfigurationError
from baton.records import WorkerRecord, gateway_key, index_key, worker_key
from router.http_server import HttpServer, listen, url_of
from router.main import main
from tests.support.fake_cluster import wait_until
from tests.support.fake_worker import MODEL, SECRET, FakeStream, FakeWorker, Scripts
from tests.support.redis_server import RedisServer, redis_server

COMPLETION = {"model": MODEL, "prompt": [11, 12, 13], "max_tokens": 5, "temperature": 0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


class GatewayProcess:
    """A running ``python -m router.main``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""

    async def listening(self) -> None:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        assert line.startswith("gateway listening on http://127.0.0.1:"), line
        self.url = line.split()[-1]

    async def end(self) -> tuple[int, str]:
        """Exit status, and what it wrote to standard error."""
        _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode()


@asynccontextmanager
async def gateway(
    tmp_path: Path, *arguments: str, environment: dict[str, str], **settings: Any
) -> AsyncIterator[GatewayProcess]:
    config = tmp_path / "baton.yaml"
    config.write_text(yaml.safe_dump({"served_model_name": MODEL} | settings))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router.main", "--config", str(config), "--port", "0"),
        *arguments,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield GatewayProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def register(client: redis.asyncio.Redis, record: WorkerRecord) -> None:
    key = worker_key("default", record.worker_id)
    await client.set(key, record.model_dump_json())
    await client.sadd(index_key("default"), key)


@asynccontextmanager
async def registered(url: str, *workers: FakeWorker) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.from_url(url)
    for worker in workers:
        await worker.start()
        await register(client, worker.record)
    try:
        yield client
    finally:
        await client.aclose()
        for worker in workers:
            await worker.stop()


async def wait_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)


async def test_gateway_serves_and_finishes_what_runs_when_it_is_told_to_end(
    tmp_path: Path, server: RedisServer
) -> None:
    scripts, held = Scripts(), asyncio.Event()

    async def decode(stream: FakeStream) -> None:
        if stream.message.prompt_token_ids[0] == 99:
            await held.wait()
        await scripts.decode(stream)

    workers = (
        FakeWorker("prefill-0", "prefill", script=scripts.prefill),
        FakeWorker("decode-0", "decode", script=decode),
    )
    environment = {"BATON_SECRET": SECRET, "REDIS_URL": server.url}
    async with (
        registered(server.url, *workers) as store,
        gateway(tmp_path, environment=environment) as process,
    ):
        await process.listening()
        async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
            await wait_ready(client)
            answer = (await client.post("/v1/completions", json=COMPLETION)).json()
            assert answer["usage"]["completion_tokens"] == 5
            assert answer["choices"][0]["finish_reason"] == "length"
            assert await store.exists(gateway_key("default", "gateway-0"))

            lasting = {**COMPLETION, "prompt": [99], "max_tokens": 2}
            running = asyncio.create_task(client.post("/v1/completions", json=lasting))
            await wait_until(lambda: len(workers[1].streams) == 2)
            process.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while (await client.get("/ready")).status_code != 503:
                    await asyncio.sleep(0.02)
            refused = await client.post("/v1/completions", json=COMPLETION)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            held.set()
            assert (await running).status_code == 200
        status, errors = await process.end()
        assert status == 0, errors
        assert "Traceback" not in errors
        assert not await store.exists(gateway_key("default", "gateway-0"))


async def test_what_outlasts_the_drain_is_told_so_and_the_gateway_ends(
    tmp_path: Path, server: RedisServer
) -> None:
    worker = FakeWorker("decode-0", "decode")
    environment = {"BATON_SECRET": SECRET, "REDIS_URL": server.url}
    async with (
        registered(server.url, worker),
        gateway(tmp_path, environment=environment, gateway={"drain_s": 0.2}) as process,
    ):
        await process.listening()
        async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
            await wait_ready(client)
            body = {**COMPLETION, "stream": True}
            request = client.build_request("POST", "/v1/completions", json=body)
            sent = asyncio.create_task(client.send(request, stream=True))
            stream = await worker.next_open()
            stream.tokens(0, 500)
            response = await sent  # its first event is on the way
            process.process.send_signal(signal.SIGINT)
            lines = [line async for line in response.aiter_lines()]
            await response.aclose()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
        assert "choices" in events[0]
        assert events[-1]["error"]["code"] == "draining"
        await wait_until(stream.cancelled.is_set)
        assert (await process.end())[0] == 0


async def test_gateways_see_each_other_and_say_while_redis_is_away(
    tmp_path: Path, server: RedisServer
) -> None:
    worker = FakeWorker("decode-0", "decode")
    environment = {"BATON_SECRET": SECRET, "REDIS_URL": server.url}
    pools = {"prefill": {"replicas": 0}, "decode": {}}
    one = gateway(tmp_path, environment=environment, pools=pools)
    two = gateway(tmp_path, "--gateway-id", "gateway-1", environment=environment, pools=pools)
    async with registered(server.url, worker) as store, one as first, two as second:
        await first.listening()
        await second.listening()
        async with httpx.AsyncClient(base_url=first.url, timeout=30) as client:
            await wait_ready(client)

            async def wait_status(**expected: Any) -> None:
                async with asyncio.timeout(20):
                    while True:
                        status = (await client.get("/status")).json()
                        if expected.items() <= status.items():
                            return
                        await asyncio.sleep(0.02)

            await wait_status(gateways=["gateway-0", "gateway-1"], degraded=[])
            server.stop()
            await wait_status(
                degraded=[
                    "The registry (Redis) does not answer.",
                    "Load is not shared with other gateways: Redis does not answer.",
                ],
                ready=True,
            )
            server.start()
            await wait_status(degraded=[], ready=True)
            second.process.kill()
            await store.connection_pool.disconnect()
            await register(store, worker.record)
            await wait_status(gateways=["gateway-0"])


@pytest.mark.parametrize(
    ("changes", "arguments", "sentence"),
    [
        ({"BATON_SECRET": ""}, (), "BATON_SECRET is not set"),
        ({"BATON_SECRET": "\n"}, (), "BATON_SECRET is nothing but whitespace"),
        ({"BATON_API_KEY": "two words"}, (), "BATON_API_KEY has whitespace inside"),
        ({"REDIS_URL": ""}, (), "REDIS_URL is not set"),
        ({"REDIS_URL": "localhost"}, (), "REDIS_URL is malformed"),
        ({"BATON_LOG_LEVEL": "LOUD"}, (), "BATON_LOG_LEVEL is 'LOUD'"),
        ({}, ("--config", "/nowhere.yaml"), "cannot read configuration /nowhere.yaml"),
    ],
)
def test_wrong_setting_ends_it_with_one_sentence(
    changes: dict[str, str],
    arguments: tuple[str, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["router.main", "--port", "0", *arguments])
    environment = {"BATON_SECRET": SECRET, "REDIS_URL": "redis://127.0.0.1:1"} | changes
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert sentence in errors
    assert len(errors.splitlines()) == 1


async def test_port_in_use_ends_it_with_one_sentence(tmp_path: Path) -> None:
    environment = {"BATON_SECRET": SECRET, "REDIS_URL": "redis://127.0.0.1:1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with gateway(tmp_path, "--port", str(port), environment=environment) as process:
            status, errors = await process.end()
    assert status == 1
    assert errors.startswith(f"cannot listen on 127.0.0.1 port {port}: Address already in use")
    assert len(errors.splitlines()) == 1


def test_address_of_nobody_here_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="choose another"):
        listen("192.0.2.1", 0)


def test_client_sockets_do_not_wait_for_acknowledgements() -> None:
    async def nodelay() -> int:
        with listen("127.0.0.1", 0) as listener:
            http = HttpServer(FastAPI())
            async with http.running(listener), httpx.AsyncClient() as client:
                await client.get(url_of(listener))
                (connection,) = http.server_state.connections
                accepted = connection.transport.get_extra_info("socket")
                option = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                return int(option)

    assert uvloop.run(nodelay()) == 1
