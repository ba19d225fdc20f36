"""Which cores a process and all that it has started may run on, from outside, thread by thread."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

Cores = Collection[int]


def pin(pid: int, cores: Cores) -> None:
    """Every thread of the process; threads that these start inherit it."""
    pinned: set[int] = set()
    while new := {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - pinned:
        for thread in new:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, cores)
        pinned |= new


def pin_tree(pid: int, cores: Cores, others: Mapping[str, Cores]) -> None:
    """The process and its descendants, each to ``cores``, or to those of the one name in
    ``others`` that its command line has as an argument.

    Raises LookupError where no process has such a name.
    """
    missing = set(others)
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            names = set(process.cmdline()) & set(others)
            missing -= names
            pin(process.pid, others[names.pop()] if names else cores)
    if missing:
        raise LookupError(f"no process of {pid} is named {', '.join(sorted(missing))}")


@contextmanager
def this_thread_on(cores: Cores) -> Iterator[None]:
    """And what it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
