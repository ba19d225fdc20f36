"""Processes named by pid and start time."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from cluster.procfs import ProcessName, descendants, is_alive, name_of, send, wait_gone


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


def named(child: subprocess.Popen[bytes]) -> ProcessName:
    name = name_of(child.pid)
    assert name is not None
    return name


def test_own_process_is_alive_under_its_name() -> None:
    name = name_of(os.getpid())
    assert name is not None
    assert is_alive(name)


def test_recycled_pid_is_not_the_process_that_had_it(sleeper: subprocess.Popen[bytes]) -> None:
    name = named(sleeper)
    before = ProcessName(name.pid, name.start_time - 1)
    assert not is_alive(before)
    assert not send(before, signal.SIGKILL)
    assert sleeper.poll() is None


def test_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    name = named(sleeper)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert name_of(sleeper.pid) is None
    assert not is_alive(name)


def test_signal_to_a_gone_process_is_false(sleeper: subprocess.Popen[bytes]) -> None:
    name = named(sleeper)
    assert send(name, signal.SIGKILL)
    sleeper.wait()
    assert not send(name, signal.SIGKILL)


async def test_wait_gone_returns_at_the_end_and_not_before(
    sleeper: subprocess.Popen[bytes],
) -> None:
    name = named(sleeper)
    waiting = asyncio.create_task(wait_gone(name))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    os.kill(sleeper.pid, signal.SIGSTOP)
    await asyncio.sleep(0.05)
    assert not waiting.done(), "a stopped process is not gone"
    sleeper.kill()
    await asyncio.wait_for(waiting, 10)


async def test_wait_gone_returns_at_once_for_another_start_time(
    sleeper: subprocess.Popen[bytes],
) -> None:
    name = named(sleeper)
    await asyncio.wait_for(wait_gone(ProcessName(name.pid, name.start_time - 1)), 10)


def test_descendants_are_found_over_generations() -> None:
    parent = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    found = {name.pid for name in descendants(os.getpid())}
    assert {parent.pid, grandchild} <= found
    assert grandchild in {name.pid for name in descendants(parent.pid)}
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
