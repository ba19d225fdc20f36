"""Pools that are scaled while `baton serve` runs, around stand-in processes."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.redis_server import redis_server
from support.standin_serving import QUICK, Serving, wait_until

from cluster.procfs import descendants, is_alive

FENCE_S = 1.0
SETTINGS: dict[str, Any] = {
    **QUICK,
    "registry": {"heartbeat_s": 0.1, "ttl_s": 1.0, "poll_s": 0.05},
    "cluster": {"backend": "processes", "fence_s": FENCE_S, "stop_timeout_s": 2.0},
    "worker": {"drain_s": 600.0},
}
Start = Callable[..., Serving]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Start]:
    started: list[Serving] = []

    def start(behaviour: str = "", folder: str = "", **options: Any) -> Serving:
        settings = {**SETTINGS, **options.pop("settings", {})}
        started.append(Serving(tmp_path / folder, settings, behaviour, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def stop(server: Serving) -> None:
    """Ends the server and shows that nothing is left of it."""
    processes = descendants(server.process.pid)
    server.process.terminate()
    assert server.process.wait(30) == 0, server.text
    assert not [process for process in processes if is_alive(process)]
    assert "Traceback" not in server.text


def test_pools_grow_and_shrink_apart_while_others_run_on(serving: Start) -> None:
    server = serving()
    server.wait_ready()
    first = server.workers()
    grown = server.baton("scale", "prefill=2", "decode=3")
    assert grown.returncode == 0, grown.stderr
    assert "decode: 3 of 3 ready" in grown.stdout
    more = server.workers()
    assert sorted(more) == ["decode-0", "decode-1", "decode-2", "prefill-0", "prefill-1"]
    assert {name: more[name] for name in first} == first, "an old worker was disturbed"
    status = server.baton("status").stdout
    assert "prefill: 2 of 2 ready" in status
    assert "decode: 3 of 3 ready" in status
    shrunk = server.baton("scale", "decode=1")
    assert shrunk.returncode == 0, shrunk.stderr
    less = server.workers()
    assert less == {name: more[name] for name in ("decode-0", "prefill-0", "prefill-1")}
    stop(server)
    assert "starting it again" not in server.text


def test_refused_wish_is_a_sentence_and_nothing_changes(serving: Start) -> None:
    server = serving()
    server.wait_ready()
    refused = server.baton("scale", "decode=0")
    assert refused.returncode == 2
    assert "no decode worker" in refused.stderr
    assert sorted(server.workers()) == ["decode-0", "prefill-0"]


def test_scaling_while_a_worker_cannot_be_restarted(serving: Start) -> None:
    server = serving()
    server.wait_ready()
    broken = server.folder / "decode-0.fails"
    broken.touch()
    os.kill(server.worker("decode-0").pid, signal.SIGKILL)
    wait_until(lambda: "decode-0 exited with status 1" in server.text, "it was not tried again")
    assert server.baton("scale", "decode=2", "--no-wait").returncode == 0
    wait_until(lambda: "decode-1" in server.workers(), "the other worker was not started")
    shrunk = server.baton("scale", "decode=1")
    assert shrunk.returncode == 0, shrunk.stderr
    assert sorted(server.workers()) == ["decode-1", "prefill-0"]
    broken.unlink()
    grown = server.baton("scale", "decode=2")
    assert grown.returncode == 0, grown.stderr
    assert sorted(server.workers()) == ["decode-0", "decode-1", "prefill-0"]
    stop(server)


def test_stopped_worker_is_fenced_and_replaced(serving: Start) -> None:
    server = serving()
    server.wait_ready()
    old = server.worker("decode-0")
    os.kill(old.pid, signal.SIGSTOP)
    wait_until(lambda: not is_alive(old), "the stopped process was not killed")
    wait_until(lambda: "decode-0" in server.workers(), "it was not replaced")
    assert "decode-0 was killed: it lost its registration" in server.text
    assert server.baton("scale", "decode=1").returncode == 0, "the new one is not ready"
    stop(server)


def test_restart_of_redis_neither_kills_a_worker_nor_forgets_a_wish(serving: Start) -> None:
    server = serving()
    server.wait_ready()
    assert server.baton("scale", "decode=2").returncode == 0
    before = server.workers()
    names = {Path(f"/proc/{p.pid}/comm").read_text().strip(): p for p in server.processes()}
    os.kill(names["redis-server"].pid, signal.SIGKILL)
    wait_until(lambda: "redis was killed by SIGKILL" in server.text, "Redis was not replaced")
    time.sleep(3 * FENCE_S)  # in which a worker without a record would be fenced
    assert server.workers() == before
    # Refused until Redis is back; then the pools are as they were wished.
    wait_until(lambda: server.baton("scale", "prefill=1").returncode == 0, "no wish is taken")
    assert server.workers() == before
    stop(server)


def test_stop_ends_a_worker_that_is_just_leaving(serving: Start) -> None:
    server = serving("deaf")
    server.wait_ready()
    assert server.baton("scale", "decode=2").returncode == 0
    assert server.baton("scale", "decode=1", "--no-wait").returncode == 0
    assert server.baton("scale", "decode=2", "--no-wait").returncode == 0
    wait_until(lambda: "decode-2" in server.workers(), "a worker that leaves gave its name away")
    assert "decode: 2 of 2 ready, 1 leaving" in server.baton("status").stdout
    stop(server)  # in its own bounds, which are far below the leaving worker's


def test_several_gateways_answer_and_each_is_replaced(serving: Start) -> None:
    server = serving(settings={"gateway": {"port": 0, "drain_s": 0, "replicas": 2}})
    server.wait_ready()
    urls = [word for word in server.text.split() if word.endswith("/v1")]
    assert len(set(urls)) == 2, server.text

    def answers(url: str) -> bool:
        try:
            with urllib.request.urlopen(url.removesuffix("/v1") + "/status", timeout=5) as page:
                return len(json.load(page)["workers"]) == 2
        except OSError:
            return False

    assert all(map(answers, urls))
    victim = int((server.folder / "gateway-1.gateway").read_text())
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "gateway-1 was killed by SIGKILL" in server.text, "nobody noticed")
    wait_until(lambda: all(map(answers, urls)), "it was not replaced at its address")
    stop(server)


def test_second_server_of_that_name_on_the_same_redis_is_refused(
    serving: Start, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as redis:
        first = serving(folder="first", redis_url=redis.url)
        first.wait_ready()
        second = serving(folder="second", redis_url=redis.url)
        assert second.process.wait(30) == 1
        assert "another controller has the pools" in second.text
        assert "--cluster" in second.text
        assert second.workers() == {}
        stop(first)


def test_wishes_of_an_earlier_run_do_not_outlive_it(serving: Start, tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        first = serving(folder="first", redis_url=redis.url)
        first.wait_ready()
        assert first.baton("scale", "decode=3").returncode == 0
        stop(first)
        second = serving(folder="second", redis_url=redis.url)
        second.wait_ready()
        assert sorted(second.workers()) == ["decode-0", "prefill-0"]
        stop(second)
