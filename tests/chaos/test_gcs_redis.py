"""The Redis of Ray's GCS goes away for a while, under load: what happens is printed as it is.

    make chaos ARGS="tests/chaos/test_gcs_redis.py -s"

The processes are those of the Helm chart, on loopback: a Ray head without room for workers,
a node with room, the controller and the gateway; what ends is started again after two
seconds, as Kubernetes would. What must hold whatever Ray does: no answer is wrong or cut
off, nothing hangs, and in the end the pools are whole and can be scaled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support.redis_server import RedisServer
from support.server import wait_until
from support.streams import Stream

from cluster.procfs import ProcessName, descendants, name_of, send
from cluster.redis_server import find_redis_server, free_port

pytestmark = pytest.mark.chaos

NUM_TOKENS = 60
PROMPT = "Count upwards from 7: 7, 8, 9,"
LOOPBACK_RAY = Path(__file__).parents[1] / "support" / "loopback_ray.py"
AGAIN_S = 2.0
AFTER_S = 90.0
"""How long after the outage the pools may take to be whole."""


class GcsRedis:
    """A Redis that keeps its data over a kill, as one for Ray's GCS should."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._command = [
            *(find_redis_server(), "--bind", "127.0.0.1", "--port", str(self.port)),
            *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"),
        ]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def holds(self, secret: str) -> bool:
        """Whether it was ever told that."""
        files = list(self._folder.rglob("*.aof"))  # of Redis 7, in a folder of their own
        assert files, "it writes down what it is told"
        return any(secret.encode() in file.read_bytes() for file in files)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Kept:
    """A process that is started again when it ends, with its descendants ended first."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.name = name
        self.ended_at: list[float] = []
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._log = folder / f"{name}.log"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=name)
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.is_set():
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            tree: set[ProcessName] = set()
            while process.poll() is None and not self._over.wait(0.2):
                tree |= set(descendants(process.pid))
            if process.poll() is not None:
                self.ended_at.append(time.monotonic())
            own = name_of(process.pid)
            for each in [*tree, *([own] if own else [])]:
                send(each, signal.SIGKILL)
            process.wait()
            self._over.wait(AGAIN_S)

    def close(self) -> None:
        self._over.set()
        self._thread.join(30)


@dataclass
class Load:
    """One request after the other, each with the same greedy answer."""

    url: str
    expected: list[int]
    num_ok: int = 0
    longest_gap_s: float = 0.0
    longest_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                stream = ask(self.url)
            except httpx.HTTPError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                over.wait(0.5)
                continue
            if stream.error is not None:
                self.errors.append(stream.error)
                over.wait(0.5)
                continue
            assert stream.token_ids == self.expected
            self.num_ok += 1
            self.longest_gap_s = max(self.longest_gap_s, stream.longest_gap_s)
            self.longest_s = max(self.longest_s, time.monotonic() - began)


def ask(url: str) -> Stream:
    stream = Stream(PROMPT)
    stream.follow(url, model="smollm2-135m-instruct", max_tokens=NUM_TOKENS)
    return stream


@contextlib.contextmanager
def loaded(url: str, expected: list[int]) -> Iterator[Load]:
    load, over = Load(url, expected), threading.Event()
    thread = threading.Thread(target=load.run, args=(over,))
    thread.start()
    try:
        yield load
    finally:
        over.set()
        thread.join(120)
        assert not thread.is_alive(), "a request hangs"


class Site:
    """Everything that runs; Ray's Redis apart."""

    def __init__(self, folder: Path, gcs_redis_port: int) -> None:
        self._folder = folder
        self._redis = RedisServer(folder)
        self._redis.start()
        gcs_port, client_port = free_port(), free_port()
        self.gateway_port, controller_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.gateway_port}"
        self._controller_url = f"http://127.0.0.1:{controller_port}"
        self._controller_token = secrets.token_hex(32)
        config = folder / "baton.yaml"
        config.write_text(yaml.safe_dump(self._settings(client_port, controller_port)))
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray = {
            **token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
        head = {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{gcs_redis_port}",
            "RAY_external_storage_namespace": "baton",
        }
        cluster_secret = secrets.token_hex(32)
        self.secrets = (cluster_secret, self._redis.url)
        baton = {
            **token,
            "BATON_SECRET": cluster_secret,
            "REDIS_URL": self._redis.url,
            "BATON_CONTROLLER_TOKEN": self._controller_token,
        }
        shared = ("--node-ip-address=127.0.0.1", "--object-store-memory=83886080", "--block")
        start = (sys.executable, str(LOOPBACK_RAY), "start", *shared)
        self.kept = {
            "head": Kept(
                "head",
                [
                    *(*start, "--head", f"--port={gcs_port}", "--num-cpus=0"),
                    f"--ray-client-server-port={client_port}",
                    *(f"--temp-dir={folder}/h", "--include-dashboard=false"),
                ],
                ray | head,
                folder,
            )
        }
        wait_until(lambda: _listens(client_port), timeout_s=60, what="Ray's head")
        self.kept["node"] = Kept(
            "node", [*start, f"--address=127.0.0.1:{gcs_port}", "--num-cpus=4"], ray, folder
        )
        python = (sys.executable, "-P", "-m")
        self.kept["controller"] = Kept(
            "controller",
            [*python, "cluster.controller_main", "--config", str(config)],
            baton,
            folder,
        )
        self.kept["gateway"] = Kept(
            "gateway", [*python, "router.main", "--config", str(config)], baton, folder
        )

    def _settings(self, client_port: int, controller_port: int) -> dict[str, Any]:
        return {
            "engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728, "threads": 1},
            "gateway": {"port": self.gateway_port},
            "controller": {"port": controller_port},
            "cluster": {"backend": "ray", "ray_address": f"ray://127.0.0.1:{client_port}"},
        }

    def ready(self) -> dict[str, str]:
        """Epoch of every ready worker."""
        with contextlib.suppress(httpx.HTTPError):
            status = httpx.get(f"{self.url}/status", trust_env=False).json()
            return {w["worker_id"]: w["epoch"] for w in status["workers"] if w["ready"]}
        return {}

    def close(self) -> None:
        for name in ("gateway", "controller", "node", "head"):
            if name in self.kept:
                self.kept[name].close()
        self._redis.stop()

    def scale(self, **pools: int) -> bool:
        """Whether the controller took the wish."""
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.put(
                f"{self._controller_url}/v1/pools",
                json=pools,
                headers={"Authorization": f"Bearer {self._controller_token}"},
                trust_env=False,
            )
            return answer.status_code == 200
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("outage_s", [10, 120])
def test_redis_of_the_gcs_away(outage_s: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="baton-gcs-", dir="/tmp"))
    redis = GcsRedis(folder)
    redis.start()
    site = None
    try:
        site = Site(folder, redis.port)
        wait_until(lambda: len(site.ready()) == 2, timeout_s=120, what="both workers")
        assert redis.holds("prefill-0"), "the workers are written down there"
        assert not any(redis.holds(secret) for secret in site.secrets)
        _outage(site, redis, outage_s)
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:], sep="\n")
        raise
    finally:
        if site is not None:
            site.close()
        redis.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _outage(site: Site, redis: GcsRedis, outage_s: int) -> None:
    expected, epochs = ask(site.url).token_ids, site.ready()
    assert len(expected) == NUM_TOKENS
    with loaded(site.url, expected) as load:
        time.sleep(3)
        began = time.monotonic()
        redis.kill()
        fewest = 2
        while time.monotonic() - began < outage_s:
            fewest = min(fewest, len(site.ready()))
            time.sleep(0.25)
        redis.start()
        back_at = time.monotonic()
        wait_until(lambda: len(site.ready()) == 2, timeout_s=AFTER_S, what="both workers again")
        whole_after_s = time.monotonic() - back_at
        wait_until(lambda: site.scale(decode=2), timeout_s=AFTER_S, what="a wish taken")
        wait_until(lambda: len(site.ready()) == 3, timeout_s=AFTER_S, what="a third worker")
        scaled_after_s = time.monotonic() - back_at
    ends = [
        f"{kept.name} ended after {at - began:.0f} s"
        for kept in site.kept.values()
        for at in kept.ended_at
        if at > began
    ]
    same = [worker for worker, epoch in epochs.items() if site.ready().get(worker) == epoch]
    print(
        f"\nRay's Redis away for {outage_s} s: {load.num_ok} answers right, longest request "
        f"{load.longest_s:.1f} s, longest gap {load.longest_gap_s:.2f} s, {len(load.errors)} "
        f"errors {sorted(set(load.errors))[:3]}; {', '.join(ends) or 'nothing ended'}; at least "
        f"{fewest} of 2 workers were ready; whole {whole_after_s:.0f} s after, a third worker "
        f"{scaled_after_s:.0f} s after; kept: {same}"
    )
    assert load.num_ok > 0
