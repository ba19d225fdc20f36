"""`baton serve` around stand-in processes: starting, replacing, stopping, dying."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.standin_serving import QUICK, Serving, wait_until

from cluster.procfs import ProcessName, descendants, is_alive


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(settings: dict[str, Any] | None = None, behaviour: str = "") -> Serving:
        serving = Serving(tmp_path, settings or QUICK, behaviour)
        started.append(serving)
        return serving

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_everything_starts_and_a_signal_ends_it_without_a_trace(
    serving: Callable[..., Serving],
) -> None:
    server = serving()
    processes = server.wait_ready()
    temp_folder = server.temp_folder
    assert len(processes) == 5, "Redis, gateway, two workers, janitor"
    assert temp_folder.exists()
    for line in ("redis", "gateway-0", "prefill-0", "decode-0"):
        assert (server.state_folder / "logs" / f"{line}.log").exists()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0, server.text
    assert not [process for process in processes if is_alive(process)]
    assert not temp_folder.exists()
    assert not (server.state_folder / "state.json").exists()
    assert "Traceback" not in server.text


@pytest.mark.parametrize("victim", ["decode-0", "gateway", "redis"])
def test_what_is_killed_is_replaced(serving: Callable[..., Serving], victim: str) -> None:
    server = serving()
    processes = server.wait_ready()
    if victim == "redis":
        names = {Path(f"/proc/{p.pid}/comm").read_text().strip(): p for p in processes}
        old = names["redis-server"]
    elif victim == "gateway":
        old = next(
            p for p in processes if p.pid == int((server.folder / "gateway-0.gateway").read_text())
        )
    else:
        old = server.worker(victim)
    os.kill(old.pid, signal.SIGKILL)

    def replaced() -> bool:
        now = {process.pid for process in descendants(server.process.pid)}
        return old.pid not in now and len(now) == len(processes)

    wait_until(replaced, f"{victim} was not replaced: {server.text}")
    assert "was killed by SIGKILL; starting it again" in server.text


def test_worker_that_dies_at_its_start_ends_the_launcher_with_its_log(
    serving: Callable[..., Serving],
) -> None:
    server = serving(behaviour="fails")
    assert server.process.wait(30) == 1
    assert "exited with status 1 while the cluster was starting" in server.text
    assert "the weights are missing" in server.text
    assert "Traceback" not in server.text
    assert not (server.state_folder / "state.json").exists()


def test_cluster_that_is_never_ready_ends_with_a_sentence(
    serving: Callable[..., Serving],
) -> None:
    settings = {**QUICK, "cluster": {"backend": "processes", "start_timeout_s": 1.0}}
    server = serving(settings, behaviour="hides")
    assert server.process.wait(30) == 1
    assert "not everything was ready within 1 s" in server.text
    assert "Traceback" not in server.text


def test_deaf_workers_are_killed_in_the_end(serving: Callable[..., Serving]) -> None:
    settings = {**QUICK, "cluster": {"backend": "processes", "stop_timeout_s": 0.3}}
    server = serving(settings, behaviour="deaf")
    processes = server.wait_ready()
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert "processes that had to be killed: 2" in server.text
    assert not [process for process in processes if is_alive(process)]


def test_second_ctrl_c_does_not_wait_for_the_drain(serving: Callable[..., Serving]) -> None:
    settings = {**QUICK, "cluster": {"backend": "processes", "stop_timeout_s": 3600.0}}
    server = serving(settings, behaviour="deaf")
    server.wait_ready()
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in server.text, "the first Ctrl-C was not heard")
    ends_at = time.monotonic() + 30
    while server.process.poll() is None and time.monotonic() < ends_at:
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert server.process.poll() == 0, server.text


def test_killed_launcher_leaves_no_process_and_no_secret(
    serving: Callable[..., Serving],
) -> None:
    server = serving()
    processes = server.wait_ready()
    temp_folder = server.temp_folder
    server.process.kill()
    server.process.wait()
    wait_until(
        lambda: not temp_folder.exists() and not any(map(is_alive, processes)),
        "something outlived the launcher",
    )


def test_second_server_of_the_same_cluster_is_refused(serving: Callable[..., Serving]) -> None:
    server = serving()
    server.wait_ready()
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "serve", "--port", "0", "--backend", "processes"],
        env={**os.environ, "BATON_STATE_DIR": str(server.folder / "state")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"already being served (pid {server.process.pid}" in done.stderr
    assert "--cluster" in done.stderr


def kill_janitor(server: Serving) -> ProcessName:
    """Which one it was."""
    (janitor,) = janitors(server)
    os.kill(janitor.pid, signal.SIGKILL)
    return janitor


def janitors(server: Serving) -> list[ProcessName]:
    return [p for p in server.processes() if "janitor.py" in command_line(p)]


def command_line(process: ProcessName) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def of_worker(server: Serving, worker_id: str) -> list[ProcessName]:
    return [p for p in server.processes() if f"--worker-id {worker_id}" in command_line(p)]


def test_killed_janitor_costs_nothing_but_itself(serving: Callable[..., Serving]) -> None:
    server = serving()
    num_processes = len(server.wait_ready())
    temp_folder, old = server.temp_folder, server.worker("decode-0")
    janitor = kill_janitor(server)
    os.kill(old.pid, signal.SIGKILL)

    def is_whole() -> bool:
        workers, now = of_worker(server, "decode-0"), janitors(server)
        return len(workers) == 1 and old not in workers and len(now) == 1 and janitor not in now

    wait_until(is_whole, f"decode-0 or the janitor was not replaced: {server.text}")
    assert len(server.processes()) == num_processes
    assert server.text.count("starting it again") == 1, "it was replaced more than once"
    processes = server.processes()
    done = server.baton("stop")
    assert done.returncode == 0, done.stderr
    assert server.process.wait(30) == 0, server.text
    assert not [process for process in processes if is_alive(process)]
    assert not temp_folder.exists(), "redis.conf holds a password"
    log = (server.state_folder / "logs" / "launcher.log").read_text()
    assert log.count("the janitor has ended") == 1
    assert "Traceback" not in log + server.text


def test_launcher_that_is_killed_after_its_janitor_leaves_nothing(
    serving: Callable[..., Serving],
) -> None:
    server = serving()
    server.wait_ready()
    temp_folder, old = server.temp_folder, kill_janitor(server)
    wait_until(lambda: [p for p in janitors(server) if p != old] != [], "another janitor")
    processes = server.processes()
    server.process.kill()
    server.process.wait()
    wait_until(
        lambda: not temp_folder.exists() and not any(map(is_alive, processes)),
        "something outlived the launcher",
    )
