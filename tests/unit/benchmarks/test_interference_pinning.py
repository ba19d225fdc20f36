"""Processes are pinned thread by thread, from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.interference.pinning import pin, pin_tree, this_thread_on

FIRST = min(os.sched_getaffinity(0))
PROGRAM = """
import subprocess, sys, threading
child = None
if len(sys.argv) == 2:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, sys.argv[1], "decode-0"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
resting = threading.Thread(target=threading.Event().wait, daemon=True)
resting.start()
print("up", flush=True)
sys.stdin.readline()
"""

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores to tell them apart"
)


def affinities(pid: int) -> set[frozenset[int]]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {frozenset(os.sched_getaffinity(int(thread.name))) for thread in threads}


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child of the name decode-0, each of two threads."""
    source = f"PROGRAM = {PROGRAM!r}\n{PROGRAM}"
    process = subprocess.Popen(
        [sys.executable, "-c", source, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.communicate(b"\n")


def child_of(process: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


@needs_two_cores
def test_every_thread_of_every_process_goes_to_its_core(parent: subprocess.Popen[bytes]) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    pin_tree(parent.pid, {first}, {"decode-0": {second}})
    assert affinities(parent.pid) == {frozenset({first})}
    assert affinities(child_of(parent)) == {frozenset({second})}


def test_a_name_that_no_process_has_is_refused(parent: subprocess.Popen[bytes]) -> None:
    with pytest.raises(LookupError, match="prefill-0"):
        pin_tree(parent.pid, {FIRST}, {"decode-0": {FIRST}, "prefill-0": {FIRST}})


@pytest.fixture
def resting_thread() -> Iterator[int]:
    """The kernel's id of a thread of this process that does nothing."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.native_id is not None
    yield thread.native_id
    done.set()
    thread.join()


@needs_two_cores
def test_only_the_thread_that_asks_moves_and_comes_back(resting_thread: int) -> None:
    before = os.sched_getaffinity(0)
    with this_thread_on({FIRST}):
        assert os.sched_getaffinity(0) == {FIRST}
        assert os.sched_getaffinity(resting_thread) == before
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before


def test_a_process_that_has_ended_is_an_error(parent: subprocess.Popen[bytes]) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(FileNotFoundError):
        pin(process.pid, {FIRST})
