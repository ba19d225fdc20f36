"""Processes named by pid and start time."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.procfs import ProcessName, descendants, is_alive, name_of, send, wait_gone

WITHOUT_ITS_FIRST_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def headless() -> Iterator[subprocess.Popen[bytes]]:
    """Its first thread has ended and is a zombie, another one goes on."""
    command = [sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD]
    with subprocess.Popen(command) as child:
        stat = Path(f"/proc/{child.pid}/stat")
        ends_at = time.monotonic() + 10
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < ends_at
            time.sleep(0.01)
        yield child
        child.kill()


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


async def test_process_is_alive_until_its_last_thread_has_ended(
    headless: subprocess.Popen[bytes],
) -> None:
    """Until then it holds its files and its memory."""
    name = named(headless)
    assert is_alive(name)
    assert name in descendants(os.getpid())
    waiting = asyncio.create_task(wait_gone(name))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    headless.kill()
    await asyncio.wait_for(waiting, 10)
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
