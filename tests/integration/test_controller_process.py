"""A pool controller of its own: one at a time, restarted without touching its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml
from support.fake_pools import FakeBackend
from support.redis_server import RedisServer, redis_server
from support.standin_serving import TESTS, wait_until

from baton.config import BatonConfig, parse_config
from baton.errors import UnavailableError
from cluster.controller_store import lease_key
from cluster.preflight import listen_for_controller
from cluster.procfs import name_of
from cluster.standalone import control

TOKEN = "t0ken"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
REGISTRY = {"heartbeat_s": 0.05, "ttl_s": 0.5, "poll_s": 0.05}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


class Controller:
    """One, in this process, over a fake backend."""

    def __init__(self, config: BatonConfig, backend: FakeBackend, redis_url: str) -> None:
        self.stop = asyncio.Event()
        self._listener = listen_for_controller(config.controller)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.task = asyncio.create_task(
            control(
                config,
                backend=backend,
                redis_url=redis_url,
                token=TOKEN,
                listener=self._listener,
                stop=self.stop,
            )
        )

    async def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.request(method, self.url + path, json=body, headers=HEADERS)

    async def wait_ready(self) -> None:
        for _ in range(600):
            assert not self.task.done(), self.task
            if (await self.ask("GET", "/ready")).status_code == 200:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it never took the pools")

    async def close(self) -> None:
        self.stop.set()
        await asyncio.wait_for(self.task, 30)
        self._listener.close()


class Rig:
    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self.backend = FakeBackend()
        self.started: list[Controller] = []

    def start(self, decode: int = 2) -> Controller:
        settings = {
            "pools": {"prefill": {}, "decode": {"replicas": decode}},
            "registry": REGISTRY,
            "cluster": {"ray_address": "ray://head:10001"},
        }
        controller = Controller(parse_config(settings), self.backend, self.redis_url)
        self.started.append(controller)
        return controller

    async def wait_running(self, *worker_ids: str) -> None:
        for _ in range(600):
            if sorted(self.backend.running()) == sorted(worker_ids):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{sorted(self.backend.running())}, not {sorted(worker_ids)}")


@pytest.fixture
async def rig(server: RedisServer) -> AsyncIterator[Rig]:
    rig = Rig(server.url)
    yield rig
    for controller in rig.started:
        if not controller.task.done():
            await controller.close()


async def test_restarted_controller_adopts_its_workers_and_honours_the_wish(rig: Rig) -> None:
    first = rig.start()
    await first.wait_ready()
    assert (await first.ask("PUT", "/v1/pools", {"decode": 3})).status_code == 200
    names = ["decode-0", "decode-1", "decode-2", "prefill-0"]
    await rig.wait_running(*names)
    await first.close()
    assert sorted(rig.backend.running()) == names, "its end took workers along"
    assert not any(process.stop_asked for process in rig.backend.started)

    rig.backend.adoptable = rig.backend.running()
    rig.backend.adoptable["decode-1"].die()
    second = rig.start()
    await second.wait_ready()
    await rig.wait_running(*names)
    pools = (await second.ask("GET", "/v1/pools")).json()["pools"]
    assert (pools["decode"]["desired"], pools["decode"]["running"]) == (3, 3)
    assert rig.backend.ids().count("decode-1") == 2, "the dead one was not replaced"
    assert rig.backend.ids().count("decode-0") == 1


async def test_controller_with_a_new_configuration_prefers_that(rig: Rig) -> None:
    first = rig.start()
    await first.wait_ready()
    await first.ask("PUT", "/v1/pools", {"decode": 4})
    await rig.wait_running("decode-0", "decode-1", "decode-2", "decode-3", "prefill-0")
    await first.close()
    rig.backend.adoptable = rig.backend.running()
    second = rig.start(decode=1)
    await second.wait_ready()
    await rig.wait_running("decode-0", "prefill-0")


async def test_second_controller_waits_says_so_and_takes_over(rig: Rig) -> None:
    first = rig.start()
    await first.wait_ready()
    second = rig.start()
    while "another controller" not in (await second.ask("GET", "/ready")).text:
        await asyncio.sleep(0.02)
    assert (await second.ask("GET", "/health")).status_code == 200
    refused = await second.ask("PUT", "/v1/pools", {"decode": 5})
    assert refused.status_code == 503
    await rig.wait_running("decode-0", "decode-1", "prefill-0")
    rig.backend.adoptable = rig.backend.running()
    await first.close()
    await second.wait_ready()
    assert len(rig.backend.started) == 3


async def test_controller_that_loses_its_lease_ends_and_leaves_its_workers(
    rig: Rig, server: RedisServer
) -> None:
    first = rig.start()
    await first.wait_ready()
    await rig.wait_running("decode-0", "decode-1", "prefill-0")
    with redis.Redis.from_url(server.url) as client:
        client.set(lease_key("default"), "usurper", px=60_000)
    with pytest.raises(UnavailableError, match=r"usurper.*its workers run on"):
        await asyncio.wait_for(first.task, 30)
    await rig.wait_running("decode-0", "decode-1", "prefill-0")


async def test_controller_whose_backend_is_lost_ends(rig: Rig) -> None:
    first = rig.start()
    await first.wait_ready()
    rig.backend.lost.set_result("the connection to Ray was lost")
    with pytest.raises(UnavailableError, match="connection to Ray was lost"):
        await asyncio.wait_for(first.task, 30)


async def test_controller_waits_for_ray_says_so_and_leaves_the_lease_to_others(
    rig: Rig, server: RedisServer
) -> None:
    rig.backend.opening = asyncio.Event()
    rig.backend.closed_doors = ["Ray could not be reached"]
    first = rig.start()
    while (said := await first.ask("GET", "/ready")).status_code != 503:
        await asyncio.sleep(0.02)
    assert "waiting for Ray at ray://head:10001" in said.text
    rig.backend.opening.set()
    while "Ray could not be reached" not in (await first.ask("GET", "/ready")).text:
        await asyncio.sleep(0.02)
    assert (await first.ask("GET", "/health")).status_code == 200
    with redis.Redis.from_url(server.url) as client:
        assert client.get(lease_key("default")) is None
    await first.wait_ready()
    assert rig.backend.num_openings == 2


async def test_controller_that_waits_for_ray_ends_at_once(rig: Rig) -> None:
    rig.backend.opening = asyncio.Event()
    first = rig.start()
    while "waiting for Ray" not in (await first.ask("GET", "/ready")).text:
        await asyncio.sleep(0.02)
    await first.close()
    assert first.task.exception() is None


async def test_controller_that_waits_for_the_lease_ends_with_its_backend(rig: Rig) -> None:
    first = rig.start()
    await first.wait_ready()
    rig.backend = FakeBackend()
    second = rig.start()
    while "another controller" not in (await second.ask("GET", "/ready")).text:
        await asyncio.sleep(0.02)
    rig.backend.lost.set_result("the connection to Ray was lost")
    with pytest.raises(UnavailableError, match="connection to Ray was lost"):
        await asyncio.wait_for(second.task, 30)
    assert (await first.ask("GET", "/ready")).status_code == 200


async def test_outage_of_redis_does_not_end_a_controller(rig: Rig, server: RedisServer) -> None:
    first = rig.start()
    await first.wait_ready()
    await first.ask("PUT", "/v1/pools", {"decode": 3})
    server.stop()
    refused = await first.ask("PUT", "/v1/pools", {"decode": 4})
    assert refused.status_code == 503
    assert "nothing was changed" in refused.text
    server.start()
    while (await first.ask("PUT", "/v1/pools", {})).status_code != 200:
        await asyncio.sleep(0.05)
    assert (await first.ask("GET", "/v1/pools")).json()["pools"]["decode"]["desired"] == 3
    await rig.wait_running("decode-0", "decode-1", "decode-2", "prefill-0")


# ---------------------------------------------------------------- as a process

RUN = """
import sys
import cluster.controller_main as root
standins = dict.fromkeys(("prefill", "decode"), "support.standin_worker")
root.MODULES = standins
root.run.__kwdefaults__["modules"] = standins
root.main()
"""


def start_process(
    folder: Path, settings: dict[str, Any], environment: dict[str, str]
) -> subprocess.Popen[str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    names = ("BATON_SECRET", "REDIS_URL", "BATON_CONTROLLER_TOKEN")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    path = f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    own = {"PYTHONPATH": path, "STANDIN_FOLDER": str(folder), "BATON_STATE_DIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, "--config", str(file)],
        env={**clean, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


GIVEN = {"BATON_SECRET": "s", "REDIS_URL": "redis://127.0.0.1:1/0", "BATON_CONTROLLER_TOKEN": "t"}


@pytest.mark.parametrize(
    ("settings", "missing", "sentence"),
    [
        ({}, "BATON_SECRET", "BATON_SECRET is not set"),
        ({}, "REDIS_URL", "REDIS_URL is not set"),
        ({}, "BATON_CONTROLLER_TOKEN", "BATON_CONTROLLER_TOKEN is not set"),
        ({}, "", "cluster.ray_address is not set"),
        ({"clutser": {}}, "", "did you mean 'cluster'"),
    ],
)
def test_what_is_missing_is_one_sentence_and_status_1(
    tmp_path: Path, settings: dict[str, Any], missing: str, sentence: str
) -> None:
    environment = {key: value for key, value in GIVEN.items() if key != missing}
    process = start_process(tmp_path, settings, environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert sentence in said
    assert "Traceback" not in said


def test_process_starts_workers_takes_wishes_and_ends_on_a_signal(
    tmp_path: Path, server: RedisServer
) -> None:
    settings = {"cluster": {"backend": "processes"}, "registry": REGISTRY}
    environment = {**GIVEN, "REDIS_URL": server.url}
    process = start_process(tmp_path, settings, environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        scale = [sys.executable, "-m", "cluster.cli", "scale", "decode=2", "--url", url]
        own = {**os.environ, "BATON_CONTROLLER_TOKEN": "t", "BATON_STATE_DIR": str(tmp_path)}

        def scaled() -> bool:  # refused until it has the lease
            done = subprocess.run(scale, env=own, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 or "controller" in done.stderr, done.stderr
            return done.returncode == 0

        wait_until(scaled, "the wish was never met")
        workers = [name_of(int(file.read_text())) for file in tmp_path.glob("*.worker")]
        assert len(workers) == 3
        environ = Path(f"/proc/{workers[0].pid}/environ").read_bytes()  # type: ignore[union-attr]
        assert b"BATON_CONTROLLER_TOKEN" not in environ
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "Traceback" not in said
    finally:
        process.kill()
        process.communicate()


def test_process_waits_for_a_ray_that_does_not_answer_and_ends_at_once_on_a_signal(
    tmp_path: Path, server: RedisServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dumb:
        address = f"127.0.0.1:{dumb.getsockname()[1]}"
        # One of Ray Client's tries takes 30 s, and the process must not wait for it.
        cluster = {"ray_address": f"ray://{address}", "stop_timeout_s": 3600}
        settings = {"cluster": cluster, "registry": REGISTRY}
        process = start_process(tmp_path, settings, {**GIVEN, "REDIS_URL": server.url})
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            dumb.settimeout(60)
            dumb.accept()[0].close()  # somebody listens: so Ray itself is asked
            dumb.accept()[0].close()
            assert f"waiting for Ray at ray://{address}" in httpx.get(f"{url}/ready").text
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=15)
            assert process.returncode == 0, said
            assert "Traceback" not in said
        finally:
            process.kill()
            process.communicate()
