"""Real child processes: their logs, their ends, and their bond to the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baton.errors import UnavailableError
from cluster import bound_child
from cluster.processes_backend import Command, ProcessesBackend, describe_status
from cluster.procfs import ProcessName, is_alive, name_of, wait_gone

SLEEP = Command(("sleep", "60"))


def backend_of(command: Command, folder: Path) -> tuple[ProcessesBackend, list[ProcessName]]:
    started: list[ProcessName] = []
    backend = ProcessesBackend(
        lambda _role, _id: command, log_folder=folder, on_started=started.append
    )
    return backend, started


async def test_output_and_environment_reach_the_workers_log(tmp_path: Path) -> None:
    script = "echo $GREETING; echo oops >&2"
    command = Command(("sh", "-c", script), {"GREETING": "hello"})
    backend, _ = backend_of(command, tmp_path)
    process = await backend.start("decode", "decode-0")
    assert (await process.wait()).code == 0
    assert (tmp_path / "decode-0.log").read_text() == "hello\noops\n"


async def test_exit_status_and_signal_are_told_apart(tmp_path: Path) -> None:
    backend, _ = backend_of(Command(("sh", "-c", "exit 3")), tmp_path)
    end = await (await backend.start("decode", "a")).wait()
    assert (end.code, end.reason) == (3, "exited with status 3")
    backend, _ = backend_of(Command(("sh", "-c", "kill -SEGV $$")), tmp_path)
    end = await (await backend.start("decode", "b")).wait()
    assert (end.code, end.reason) == (-signal.SIGSEGV, "was killed by SIGSEGV")


async def test_stop_is_sigterm(tmp_path: Path) -> None:
    script = "trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    backend, _ = backend_of(Command(("sh", "-c", script)), tmp_path)
    process = await backend.start("decode", "decode-0")
    log = tmp_path / "decode-0.log"
    while "up" not in log.read_text():
        await asyncio.sleep(0.01)
    await process.stop()
    assert (await process.wait()).code == 0
    assert "asked" in log.read_text()


async def test_kill_ends_a_stopped_process(tmp_path: Path) -> None:
    backend, started = backend_of(SLEEP, tmp_path)
    process = await backend.start("decode", "decode-0")
    os.kill(started[0].pid, signal.SIGSTOP)
    await process.kill()
    assert (await process.wait()).code == -signal.SIGKILL
    assert not is_alive(started[0])


async def test_child_is_out_of_reach_of_the_terminals_ctrl_c(tmp_path: Path) -> None:
    backend, started = backend_of(SLEEP, tmp_path)
    process = await backend.start("decode", "decode-0")
    assert os.getpgid(started[0].pid) != os.getpgid(0)
    await process.kill()
    await process.wait()


async def test_command_that_does_not_exist_says_so_in_its_log(tmp_path: Path) -> None:
    backend, _ = backend_of(Command(("/no/such/command",)), tmp_path)
    end = await (await backend.start("decode", "decode-0")).wait()
    assert end.code == 1
    assert "cannot run /no/such/command" in (tmp_path / "decode-0.log").read_text()


async def test_log_folder_that_is_missing_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    backend, _ = backend_of(SLEEP, tmp_path / "missing")
    with pytest.raises(UnavailableError, match="cannot start decode-0"):
        await backend.start("decode", "decode-0")


def test_child_dies_with_a_parent_that_is_killed() -> None:
    parent_code = (
        "import os, subprocess, sys, time\n"
        "child = [sys.executable, '-I', '-S', sys.argv[1], str(os.getpid()), 'sleep', '60']\n"
        "print(subprocess.Popen(child).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, bound_child.__file__], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    child = name_of(int(parent.stdout.readline()))
    assert child is not None
    while Path(f"/proc/{child.pid}/comm").read_text().strip() != "sleep":
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(asyncio.wait_for(wait_gone(child), 10))


def test_bound_child_refuses_to_outlive_a_parent_that_is_gone_already() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", bound_child.__file__, "1", "echo", "ran"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == ""


def test_unknown_signals_are_described_too() -> None:
    assert describe_status(-250) == "was killed by signal 250"


async def test_child_that_nobody_could_take_note_of_does_not_live_on(tmp_path: Path) -> None:
    told: list[ProcessName] = []

    def refuse(name: ProcessName) -> None:
        told.append(name)
        raise BrokenPipeError("nobody listens")

    backend = ProcessesBackend(lambda _role, _id: SLEEP, log_folder=tmp_path, on_started=refuse)
    with pytest.raises(BrokenPipeError):
        await backend.start("decode", "decode-0")
    (name,) = told
    assert not is_alive(name)
    assert [child.over for child in backend._children] == [True], "it was not reaped"
