"""What a launcher leaves behind is cleaned up, also when it was killed."""

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

from cluster import janitor
from cluster.janitor_client import Janitor
from cluster.procfs import ProcessName, name_of


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield children
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def sleeper(sleepers: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    return sleepers[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "temp"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "redis.conf").write_text("requirepass secret")
    return folder


def test_finish_kills_what_is_left_and_removes_the_folder(
    folder: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    keeper = Janitor(folder)
    keeper.watch(name)
    assert sleeper.poll() is None
    keeper.finish()
    assert not folder.exists()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_recycled_pid_is_spared(folder: Path, sleeper: subprocess.Popen[bytes]) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    keeper = Janitor(folder)
    keeper.watch(ProcessName(name.pid, name.start_time - 1))
    keeper.finish()
    assert sleeper.poll() is None


def test_janitor_that_is_told_of_itself_still_cleans_up(folder: Path) -> None:
    keeper = Janitor(folder)
    name = name_of(keeper.pid)
    assert name is not None
    keeper.watch(name)
    keeper.finish()
    assert not folder.exists()


def test_killed_launcher_is_cleaned_up_after(
    folder: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cluster.janitor_client import Janitor\n"
        "from cluster.procfs import ProcessName\n"
        "keeper = Janitor(Path(sys.argv[1]))\n"
        "keeper.watch(ProcessName(int(sys.argv[2]), int(sys.argv[3])))\n"
        "print('watched', flush=True)\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(name.pid), str(name.start_time)],
        stdout=subprocess.PIPE,
    )
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert sleeper.wait(10) == -signal.SIGKILL
    wait_removed(folder)


def wait_removed(folder: Path) -> None:
    ends_at = time.monotonic() + 10
    while folder.exists() and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert not folder.exists()


def kill(keeper: Janitor) -> int:
    """Kills the janitor itself; its pid. A zombie is left, as in a launcher."""
    pid = keeper.pid
    os.kill(pid, signal.SIGKILL)
    while name_of(pid) is not None:
        time.sleep(0.01)
    return pid


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "another takes its place" in line]


def test_janitor_that_was_killed_is_replaced_by_one_that_knows_as_much(
    folder: Path, sleepers: list[subprocess.Popen[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (name_of(child.pid) for child in sleepers)
    assert first is not None
    assert second is not None
    keeper = Janitor(folder)
    keeper.watch(first)
    killed = kill(keeper)
    keeper.watch(second)
    assert keeper.pid != killed
    assert folder.exists()
    keeper._child.stdin.close()  # type: ignore[union-attr]  # as the kernel does for a dead one
    assert [child.wait(10) for child in sleepers] == [-signal.SIGKILL] * 2
    wait_removed(folder)
    assert len(warnings(caplog)) == 1
    assert not Path(f"/proc/{killed}").exists(), "the dead one was not reaped"
    keeper.finish()


def test_launcher_cleans_up_itself_where_its_janitor_was_killed(
    folder: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    keeper = Janitor(folder)
    keeper.watch(name)
    kill(keeper)
    keeper.finish()
    assert not folder.exists()
    assert sleeper.wait(10) == -signal.SIGKILL


def test_janitor_that_is_stopped_holds_nobody_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.janitor_client._FINISH_S", 0.1)
    keeper = Janitor(folder)
    os.kill(keeper.pid, signal.SIGSTOP)
    keeper.finish()
    assert not folder.exists()


async def test_kept_janitor_is_replaced_before_there_is_something_to_tell(
    folder: Path, sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    keeper = Janitor(folder)
    keeper.watch(name)
    keeping = asyncio.create_task(keeper.keep())
    await asyncio.sleep(0)
    killed = keeper.pid
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(10):
        while keeper.pid == killed:
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    keeper._child.stdin.close()  # type: ignore[union-attr]  # as the kernel does for a dead one
    assert sleeper.wait(10) == -signal.SIGKILL
    wait_removed(folder)
    assert len(warnings(caplog)) == 1
    keeper.finish()


def test_janitor_that_cannot_be_replaced_is_said_once_and_tried_again(
    folder: Path,
    sleeper: subprocess.Popen[bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = name_of(sleeper.pid)
    assert name is not None
    keeper = Janitor(folder)
    kill(keeper)
    spawn = keeper._spawn

    def refuse() -> subprocess.Popen[bytes]:
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(keeper, "_spawn", refuse)
    for _ in range(3):
        keeper.watch(name)
    assert len([line for line in caplog.messages if "none can be started" in line]) == 1
    monkeypatch.setattr(keeper, "_spawn", spawn)
    keeper.watch(name)
    keeper.finish()
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not folder.exists()


def test_clean_up_of_nothing_removes_the_folder(folder: Path) -> None:
    janitor.clean_up([], str(folder))
    assert not folder.exists()
