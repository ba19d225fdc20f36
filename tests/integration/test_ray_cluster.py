"""A cluster on a Ray of its own: bound to loopback, repaired, and gone with its launcher."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import BatonServer, wait_until
from support.sockets import listening_addresses

from cluster.procfs import ProcessName, command_of, descendants, is_alive

pytestmark = pytest.mark.slow

LOOPBACK = {
    "0100007F",  # 127.0.0.1, as the kernel prints it
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatonServer]:
    server = BatonServer(tmp_path_factory.mktemp("ray"), backend="ray").start()
    yield server
    server.stop()


def actors(server: BatonServer) -> list[ProcessName]:
    return [p for p in descendants(server.pid) if command_of(p).startswith("ray::Worker")]


def ready(server: BatonServer) -> list[str]:
    return [row["worker_id"] for row in server.status()["workers"] if row["ready"]]


def test_every_process_listens_on_loopback_alone(server: BatonServer) -> None:
    processes = descendants(server.pid)
    commands = {command_of(process) for process in processes}
    assert {"gcs_server", "raylet", "redis-server"} <= commands
    addresses = {a for process in processes for a in listening_addresses(process)}
    assert addresses
    assert addresses <= LOOPBACK


def test_killed_worker_is_replaced_and_the_cluster_answers_again(server: BatonServer) -> None:
    before = {row["worker_id"]: row["epoch"] for row in server.status()["workers"]}
    for process in actors(server):
        os.kill(process.pid, signal.SIGKILL)

    def replaced() -> bool:
        now = {row["worker_id"]: row["epoch"] for row in server.status()["workers"]}
        fresh = all(now.get(worker_id) not in (None, before[worker_id]) for worker_id in before)
        return fresh and sorted(ready(server)) == sorted(before)

    wait_until(replaced, timeout_s=60, what=f"both workers replaced\n{server.log}")
    assert server.complete(prompt="The capital of France is", max_tokens=4)["choices"]


def test_killed_launcher_takes_ray_and_everything_else_along(server: BatonServer) -> None:
    processes = descendants(server.pid)
    state = json.loads((server.folder / "state" / "default" / "state.json").read_text())
    assert Path(state["temp_folder"]).exists()
    os.kill(server.pid, signal.SIGKILL)
    wait_until(
        lambda: not any(is_alive(p) for p in processes) and not Path(state["temp_folder"]).exists(),
        timeout_s=20,
        what="nothing left of a killed launcher",
    )
