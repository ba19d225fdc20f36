"""Cleans up after a launcher, also after one that was killed.

    python -I -S janitor.py FOLDER

It reads ``PID START_TIME`` lines on its standard input until that ends, which
happens when the launcher closes it or dies in whatever way. Then it kills those
of the named processes that still run and removes the folder. The kernel kills
Baton's own children by itself (``bound_child``); this is for processes that Ray
starts, some of which outlive its raylet by a minute, and for what lies on disk.

Only the standard library is here, so that it costs few milliseconds and megabytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time

PATIENCE_S = 5.0
"""How long killed processes may take to be gone before their folder is removed."""


def _start_time(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # As in procfs.py: what is a zombie with other threads still holds files and memory.
    ended = fields[0] == "X" or (fields[0] == "Z" and int(fields[17]) <= 1)
    return None if ended else int(fields[19])


def clean_up(processes: list[tuple[int, int]], folder: str) -> None:
    """Kills every (pid, start time) that still runs, waits, removes ``folder``."""
    deadline = time.monotonic() + PATIENCE_S
    left = [one for one in processes if _start_time(one[0]) == one[1]]
    for pid, _ in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [one for one in left if _start_time(one[0]) == one[1]]
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    processes: list[tuple[int, int]] = []
    for line in sys.stdin:
        pid, start_time = line.split()
        if int(pid) != os.getpid():  # it is a child of the launcher too
            processes.append((int(pid), int(start_time)))
    clean_up(processes, sys.argv[1])


if __name__ == "__main__":
    main()
