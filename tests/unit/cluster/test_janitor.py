"""What a launcher leaves behind is cleaned up, also when it was killed."""

from __future__ import annotations

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
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


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
    name = name_of(keeper._child.pid)
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
    ends_at = time.monotonic() + 10
    while folder.exists() and time.monotonic() < ends_at:
        time.sleep(0.01)
    assert not folder.exists()


def test_clean_up_of_nothing_removes_the_folder(folder: Path) -> None:
    janitor.clean_up([], str(folder))
    assert not folder.exists()
