"""The cache: built once by whoever comes first, never seen incomplete."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from baton.checkpoint.cache import build_once, cache_root
from baton.errors import CheckpointError

DIES_WHILE_BUILDING = """
import os, signal, sys
from pathlib import Path
from baton.checkpoint.cache import build_once

def build(folder):
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

build_once(Path(sys.argv[1]), ["a"], build)
"""


def write(*names: str, text: str = "whole") -> Builder:
    return Builder(names, text)


class Builder:
    def __init__(self, names: tuple[str, ...], text: str) -> None:
        self.names, self.text, self.num_calls = names, text, 0
        self.num_parts_seen, self.inode = 0, 0

    def __call__(self, folder: Path) -> None:
        self.num_calls += 1
        self.num_parts_seen = len(list(folder.parent.glob(".*.part-*")))
        self.inode = folder.stat().st_ino
        for name in self.names:
            (folder / name).write_text(self.text)


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    build = write("a", "b")
    for _ in range(2):
        folder = build_once(tmp_path / "x" / "y", ["a", "b"], build)
    assert build.num_calls == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_folder_appears_whole_by_one_rename(tmp_path: Path) -> None:
    build = write("a")
    assert build_once(tmp_path / "y", ["a"], build).stat().st_ino == build.inode


def test_many_that_want_it_at_once_get_one_build(tmp_path: Path) -> None:
    class Slow(Builder):
        def __call__(self, folder: Path) -> None:
            time.sleep(0.05)
            super().__call__(folder)

    build, faults, num_threads = Slow(("a",), "whole"), [], 8
    barrier = threading.Barrier(num_threads)

    def want() -> None:
        barrier.wait()
        folder = build_once(tmp_path / "y", ["a"], build)
        if (folder / "a").read_text() != "whole":
            faults.append(folder)

    threads = [threading.Thread(target=want) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.num_calls == 1
    assert not faults


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        build_once(tmp_path / "y", ["a"], fail)
    assert [path.name for path in tmp_path.iterdir()] == [".y.lock"]
    assert (build_once(tmp_path / "y", ["a"], write("a")) / "a").read_text() == "whole"


def test_what_a_killed_builder_left_is_removed_and_not_used(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES_WHILE_BUILDING, str(tmp_path / "y")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "y").exists()
    assert len(list(tmp_path.glob(".y.part-*"))) == 1
    build = write("a")
    folder = build_once(tmp_path / "y", ["a"], build)
    assert build.num_parts_seen == 1  # removed before more of the disk is used
    assert (folder / "a").read_text() == "whole"
    assert not list(tmp_path.glob(".y.part-*"))


def test_a_folder_that_lost_a_file_is_built_anew(tmp_path: Path) -> None:
    folder = build_once(tmp_path / "y", ["a", "b"], write("a", "b", text="old"))
    (folder / "b").unlink()
    build_once(folder, ["a", "b"], write("a", "b", text="new"))
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "new", "b": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"y", ".y.lock"}


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set BATON_CACHE"):
        build_once(tmp_path / "file" / "y", ["a"], write("a"))


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("BATON_CACHE", "/own")
    assert cache_root() == Path("/own")
    monkeypatch.delenv("BATON_CACHE")
    assert cache_root() == Path("/xdg/baton")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_root() == Path("/home/someone/.cache/baton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/someone/.cache/baton")
