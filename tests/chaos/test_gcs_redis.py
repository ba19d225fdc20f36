"""The Redis of Ray's GCS goes away for a while, under load: what happens is printed as it is.

    make chaos ARGS="tests/chaos/test_gcs_redis.py -s"

What must hold whatever Ray does: no answer is wrong or cut off, and nothing hangs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from support.server import BatonServer, wait_until
from support.streams import Stream

from cluster.procfs import command_of, descendants, is_alive, name_of, send
from cluster.redis_server import find_redis_server, free_port

pytestmark = pytest.mark.chaos

NUM_TOKENS = 60
PROMPT = "Count upwards from 7: 7, 8, 9,"


class GcsRedis:
    """A Redis that keeps its data over a kill, as one for Ray's GCS should."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._command = [
            *(find_redis_server(), "--bind", "127.0.0.1", "--port", str(self.port)),
            *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class RayHead:
    """`ray start --head` with its GCS's data in Redis; ended by pid, to the last process."""

    folder: Path
    redis_port: int
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.port = free_port()
        self.environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        redis = {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{self.redis_port}",
            "RAY_external_storage_namespace": "baton",
        }
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--port", str(self.port)),
                *("--temp-dir", str(self.folder / "ray"), "--include-dashboard", "false"),
                *("--num-cpus", "8", "--object-store-memory", str(80 * 1024 * 1024)),
                *("--ray-client-server-port", str(free_port())),
            ],
            env={**os.environ, **self.environment, **redis},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: {"gcs_server", "raylet"} <= self.alive(), timeout_s=60, what="Ray")
        self._all = descendants(self._process.pid)

    def alive(self) -> set[str]:
        """Commands of what runs under it."""
        return {command_of(process) for process in descendants(self._process.pid)}

    def end(self) -> None:
        own = name_of(self._process.pid)
        for process in [*self._all, *descendants(self._process.pid), *([own] if own else [])]:
            send(process, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(is_alive, self._all)), timeout_s=20, what="Ray's end")


@dataclass
class Load:
    """One request after the other, each with the same greedy answer."""

    server: BatonServer
    expected: list[int]
    num_ok: int = 0
    longest_gap_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            stream = Stream(PROMPT)
            try:
                stream.follow(
                    self.server.url,
                    self.server,
                    model="smollm2-135m-instruct",
                    max_tokens=NUM_TOKENS,
                    cache_salt="",
                )
            except httpx.HTTPError as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.5)
                continue
            if stream.error is not None:
                self.errors.append(stream.error)
                time.sleep(0.5)
                continue
            assert stream.token_ids == self.expected
            self.num_ok += 1
            self.longest_gap_s = max(self.longest_gap_s, stream.longest_gap_s)


@contextlib.contextmanager
def loaded(server: BatonServer, expected: list[int]) -> Iterator[Load]:
    load, over = Load(server, expected), threading.Event()
    thread = threading.Thread(target=load.run, args=(over,))
    thread.start()
    try:
        yield load
    finally:
        over.set()
        thread.join(120)
        assert not thread.is_alive(), "a request hangs"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("outage_s", [10, 120])
def test_redis_of_the_gcs_away(tmp_path: Path, outage_s: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="baton-gcs-", dir="/tmp"))
    redis = GcsRedis(folder)
    head = RayHead(folder, redis.port)
    try:
        redis.start()
        head.start()
        server = BatonServer(
            tmp_path,
            backend="ray",
            settings={"engine": {"dtype": "float32", "kv_cache_bytes": 134_217_728}},
            arguments=("--ray-address", f"127.0.0.1:{head.port}"),
            environment=head.environment,
        )
        server.start()
        try:
            _outage(server, head, redis, outage_s)
        finally:
            server.stop(signal.SIGTERM)
    finally:
        head.end()
        redis.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _outage(server: BatonServer, head: RayHead, redis: GcsRedis, outage_s: int) -> None:
    answer = server.complete(prompt=PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    expected = answer["choices"][0]["token_ids"]
    epochs = {w["worker_id"]: w["epoch"] for w in server.status()["workers"]}
    lines = []
    with loaded(server, expected) as load:
        time.sleep(3)
        began = time.monotonic()
        redis.kill()
        gone_at: dict[str, float] = {}
        while (passed_s := time.monotonic() - began) < outage_s:
            for name in ("gcs_server", "raylet"):
                if name not in head.alive():
                    gone_at.setdefault(name, passed_s)
            time.sleep(0.25)
        redis.start()
        time.sleep(20)
    lines += [f"{name} gone after {after_s:.0f} s" for name, after_s in gone_at.items()]
    answers_after = True
    try:
        now = {w["worker_id"]: w["epoch"] for w in server.status()["workers"] if w["ready"]}
    except httpx.HTTPError:
        now, answers_after = {}, False
    kept = [worker for worker, epoch in epochs.items() if now.get(worker) == epoch]
    print(
        f"\nRay's Redis away for {outage_s} s: {load.num_ok} answers right, "
        f"longest gap {load.longest_gap_s:.2f} s, {len(load.errors)} errors "
        f"({sorted(set(load.errors))[:3]}); {', '.join(lines) or 'Ray lived on'}; "
        f"gateway answers: {answers_after}; same workers still ready: {kept}"
    )
    print("\n".join(server.log.splitlines()[-6:]))
    assert load.num_ok > 0
