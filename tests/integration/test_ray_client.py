"""A controller apart from the Ray cluster: it comes and goes, its workers stay.

Two Ray nodes on this machine, token authentication, Ray Client and a plain address.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import support
import yaml
from support.server import wait_until
from support.standin_pool import noted, write_standin

from cluster.procfs import ProcessName, descendants, is_alive, name_of, send
from cluster.redis_server import free_port

pytestmark = pytest.mark.slow

SUPPORT = Path(next(iter(support.__path__)))


class Controller:
    """One ``ray_controller.py``; its lines are kept as they come."""

    def __init__(self, ground: Ground, address: str, *options: str) -> None:
        self.lines: list[dict[str, Any]] = []
        log = (ground.folder / "controllers.log").open("ab")
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(SUPPORT / "ray_controller.py")),
                *(str(ground.folder / "config.yaml"), address, *options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=ground.environment,
            cwd=ground.folder / "shadow",  # Ray's workers look there first
            text=True,
        )
        log.close()
        self._log = ground.folder / "controllers.log"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(json.loads(line) for line in self.process.stdout)

    def _find(self, key: str, value: Any) -> dict[str, Any] | None:
        return next((x for x in self.lines if key in x and value in (None, x[key])), None)

    def heard(self, key: str, value: Any = None) -> dict[str, Any]:
        """The first line with that key (and value)."""
        wait_until(
            lambda: self._find(key, value) is not None, timeout_s=60, what=f"{key} {value}: {self}"
        )
        found = self._find(key, value)
        assert found is not None
        return found

    def __repr__(self) -> str:
        return f"{self.lines}\n{self._log.read_text()[-3000:]}"

    def order(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        if words != ("close",):
            self.heard("done", list(words))

    def end(self, *, hard: bool) -> None:
        if self.process.poll() is None:
            if hard:
                self.process.kill()
            else:
                self.order("close")
        self.process.wait(60)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Ground:
    """The cluster, and the controllers of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.port, self.client_port = free_port(), free_port()
        shadow = write_standin(folder)
        path = [str(shadow), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self.environment = {
            **_without(os.environ, "BATON_"),
            "PYTHONPATH": os.pathsep.join(part for part in path if part),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            # The head forks a server for every client; with fork support of gRPC one in ten
            # hung in that, and its client with it.
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "BATON_ADVERTISE_HOST": "of-the-controller",
            "BATON_CONTROLLER_TOKEN": "of-the-controller",
            "BATON_LOG_LEVEL": "DEBUG",
        }
        pool = {"role": "prefill", "engine": {"kv_cache_bytes": 1 << 20}}
        pools = {
            "prefill": {**pool, "resources": {"prefill_node": 1}},
            "wide": {**pool, "resources": {"spare": 2}},
            "decode": {},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump({"pools": pools}))
        nodes_own = {"BATON_ADVERTISE_HOST": "of-the-node"}
        self._cluster = subprocess.Popen(
            [
                *(sys.executable, str(SUPPORT / "two_node_ray.py")),
                *(str(folder), str(self.port), str(self.client_port)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_without(self.environment, "BATON_") | nodes_own,
            cwd=folder,
        )
        assert self._cluster.stdout is not None
        assert self._cluster.stdout.readline() == b"ready\n"
        self._processes = descendants(self._cluster.pid)
        self._controllers: list[Controller] = []

    @property
    def plain(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def by_client(self) -> str:
        return f"ray://127.0.0.1:{self.client_port}"

    def controller(self, *options: str, address: str | None = None) -> Controller:
        made = Controller(self, address or self.by_client, *options)
        self._controllers.append(made)
        return made

    def worker(self, worker_id: str) -> ProcessName:
        """The stand-in's process, once it is up."""
        wait_until(
            lambda: noted(self.folder, worker_id) is not None,
            timeout_s=60,
            what=f"{worker_id}: {self._controllers}",
        )
        facts = noted(self.folder, worker_id)
        assert facts is not None
        name = name_of(facts["pid"])
        assert name is not None
        return name

    def end_controllers(self) -> None:
        for controller in self._controllers:
            controller.end(hard=True)
        self._controllers.clear()

    def close(self) -> None:
        """Ends what there is, by pid; the GCS does not listen to SIGTERM."""
        assert self._cluster.stdin is not None
        assert self._cluster.stdout is not None
        self._processes += descendants(self._cluster.pid)
        self._cluster.stdin.close()
        self._cluster.stdout.close()
        try:
            self._cluster.wait(30)
        finally:
            self._cluster.kill()
            for process in self._processes:
                send(process, signal.SIGKILL)


def _without(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(prefix)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ground]:
    folder = Path(tempfile.mkdtemp(prefix="brc-"))
    ground = Ground(folder)
    yield ground
    ground.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ground(cluster: Ground) -> Iterator[Ground]:
    yield cluster
    cluster.end_controllers()


def is_gone(process: ProcessName) -> Callable[[], bool]:
    return lambda: not is_alive(process)


@pytest.mark.parametrize("how", ["client", "plain"])
def test_worker_outlives_a_killed_controller_and_the_next_one_adopts_it(
    ground: Ground, how: str
) -> None:
    address = ground.by_client if how == "client" else ground.plain
    worker_id = f"prefill-{how}"
    first = ground.controller(address=address)
    assert first.heard("adopted") == {"adopted": []}
    first.order("start", "prefill", worker_id)
    process = ground.worker(worker_id)
    first.end(hard=True)
    second = ground.controller(address=address)
    assert second.heard("adopted") == {"adopted": [worker_id]}
    assert is_alive(process)
    second.end(hard=False)
    assert second.process.returncode == 0, second
    third = ground.controller(address=address)
    assert third.heard("adopted") == {"adopted": [worker_id]}
    assert is_alive(process), "a controller that ends leaves its workers running"
    third.order("stop", worker_id)
    assert third.heard("ended") == {"ended": worker_id, "code": 0, "reason": "ended"}
    assert not is_alive(process)
    assert (ground.folder / f"{worker_id}.asked").exists()
    fourth = ground.controller(address=address)
    assert fourth.heard("adopted") == {"adopted": []}


def test_worker_that_was_placed_between_two_controllers_is_begun_by_the_next(
    ground: Ground,
) -> None:
    first = ground.controller("idle")
    assert first.heard("adopted") == {"adopted": []}
    first.order("start", "prefill", "prefill-idle")
    assert first.process.wait(60) == -signal.SIGKILL, first
    assert noted(ground.folder, "prefill-idle") is None, "nobody has begun it"
    second = ground.controller()
    assert second.heard("adopted") == {"adopted": ["prefill-idle"]}
    ground.worker("prefill-idle")
    facts = noted(ground.folder, "prefill-idle")
    assert facts is not None
    assert facts["secret"] == "of-this-test"
    second.order("stop", "prefill-idle")
    assert second.heard("ended")["code"] == 0


def test_launcher_ends_what_a_dead_one_has_left_and_nothing_of_a_living_one(
    ground: Ground,
) -> None:
    first = ground.controller("owner")
    assert first.heard("adopted") == {"adopted": []}
    first.order("start", "prefill", "prefill-own")
    process = ground.worker("prefill-own")
    second = ground.controller("owner", address=ground.plain)
    refused = second.heard("refused")["refused"]
    assert f"prefill-own (its launcher runs here, pid {first.process.pid})" in refused
    assert second.process.wait(60) == 0
    assert is_alive(process)
    os.kill(process.pid, signal.SIGSTOP)  # else it would die with its launcher
    first.end(hard=True)
    assert is_alive(process)
    third = ground.controller("owner", address=ground.plain)
    assert third.heard("adopted") == {"adopted": []}
    assert not is_alive(process)


def test_launcher_refuses_a_controllers_workers_and_says_how_to_end_them(ground: Ground) -> None:
    first = ground.controller(address=ground.plain)
    first.order("start", "prefill", "prefill-kept")
    process = ground.worker("prefill-kept")
    first.end(hard=True)
    second = ground.controller("owner", address=ground.plain)
    refused = second.heard("refused")["refused"]
    assert "prefill-kept (of a controller that stands apart)" in refused
    assert is_alive(process)
    command = refused[refused.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(shlex.split(command), env=ground.environment, check=True, timeout=60)
    wait_until(is_gone(process), timeout_s=30, what="the worker is ended")


def test_node_has_its_own_address_and_no_secret_of_the_controller(ground: Ground) -> None:
    controller = ground.controller()
    controller.order("start", "prefill", "prefill-env")
    ground.worker("prefill-env")
    facts = noted(ground.folder, "prefill-env")
    assert facts is not None
    assert facts["secret"] == "of-this-test"
    own = {k: v for k, v in facts["environment"].items() if k.startswith("BATON_")}
    assert own == {"BATON_ADVERTISE_HOST": "of-the-node", "BATON_LOG_LEVEL": "DEBUG"}
    controller.order("kill", "prefill-env")
    controller.heard("ended", "prefill-env")
    logs = ground.folder.glob("**/logs/**/*")
    said = [f for f in logs if f.is_file() and b"of-this-test" in f.read_bytes()]
    assert said == []


def test_stopped_worker_of_another_machine_is_killed_there_with_proof(ground: Ground) -> None:
    controller = ground.controller("remote")
    controller.order("start", "prefill", "prefill-far")
    process = ground.worker("prefill-far")
    os.kill(process.pid, signal.SIGSTOP)
    controller.order("kill", "prefill-far")
    end = controller.heard("ended", "prefill-far")
    assert not is_alive(process), "it was said to be gone"
    assert end["reason"] == "was killed"


def test_stopped_worker_is_adopted_and_killed(ground: Ground) -> None:
    """It answers nothing: only what it noted at its start tells which process it is."""
    first = ground.controller("remote")
    first.order("start", "prefill", "prefill-dumb")
    process = ground.worker("prefill-dumb")
    os.kill(process.pid, signal.SIGSTOP)
    first.end(hard=True)
    second = ground.controller("remote")
    assert second.heard("adopted") == {"adopted": ["prefill-dumb"]}
    second.order("kill", "prefill-dumb")
    second.heard("ended", "prefill-dumb")
    assert not is_alive(process)


def test_worker_of_another_machine_that_is_killed_there_is_noticed(ground: Ground) -> None:
    controller = ground.controller("remote")
    controller.order("start", "prefill", "prefill-hit")
    process = ground.worker("prefill-hit")
    os.kill(process.pid, signal.SIGKILL)
    assert "was killed" in controller.heard("ended", "prefill-hit")["reason"]


def test_worker_that_ends_while_nobody_looks_ends_its_process_and_its_place(
    ground: Ground,
) -> None:
    first = ground.controller()
    first.order("start", "prefill", "prefill-gone")
    process = ground.worker("prefill-gone")
    first.end(hard=True)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(is_gone(process), timeout_s=10, what="the process is killed")
    time.sleep(1)  # Ray learns of it
    second = ground.controller()
    assert second.heard("adopted") == {"adopted": []}
    for number in range(4):  # all the room that there is
        second.order("start", "prefill", f"prefill-again{number}")
        ground.worker(f"prefill-again{number}")
    for number in range(4):
        second.order("kill", f"prefill-again{number}")
        second.heard("ended", f"prefill-again{number}")


def test_worker_without_room_waits_is_adopted_waiting_and_can_be_cancelled(
    ground: Ground,
) -> None:
    first = ground.controller()
    first.order("start", "wide", "wide-0")
    wait_until(
        lambda: "wide-0" in repr(first) and "waits for room" in repr(first),
        timeout_s=30,
        what=f"it says that it waits: {first}",
    )
    assert "1 CPU, 2 spare" in repr(first)
    first.end(hard=True)
    second = ground.controller()
    assert second.heard("adopted") == {"adopted": ["wide-0"]}
    second.order("stop", "wide-0")
    assert second.heard("ended")["reason"] == "was ended before it had a place"
    third = ground.controller()
    assert third.heard("adopted") == {"adopted": []}
