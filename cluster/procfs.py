"""What the kernel says of processes: start times, descendants, ends.

A pid alone names nobody for long. A process is named here by its pid and its
start time (clock ticks after boot, field 22 of ``/proc/PID/stat``), so that a
recycled pid is never taken for the process that had it before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessName:
    """One process of this machine, for as long as the machine runs."""

    pid: int
    start_time: int


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` from the third (the state) on; None for no process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses, and may itself hold some.
    return text.rpartition(")")[2].split()


def _has_ended(fields: list[str]) -> bool:
    """A killed process holds its files, locks and memory until its last thread has ended;
    the first one may be a zombie long before (measured: 70 ms). That one counts the threads."""
    return fields[0] == "X" or (fields[0] == "Z" and int(fields[17]) <= 1)


def name_of(pid: int) -> ProcessName | None:
    """The process that has ``pid`` now; None when nobody has it, or only a zombie."""
    fields = _stat_fields(pid)
    if fields is None or _has_ended(fields):
        return None
    return ProcessName(pid, int(fields[19]))


def is_alive(process: ProcessName) -> bool:
    """Whether this very process runs (or is stopped); a zombie does not."""
    return name_of(process.pid) == process


def command_of(process: ProcessName) -> str:
    """The kernel's short name of its command; empty once it is gone."""
    try:
        return Path(f"/proc/{process.pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def send(process: ProcessName, signal_number: signal.Signals) -> bool:
    """Signals this very process, through a pidfd; False when it is gone."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal_number)
            return True
        return False
    finally:
        os.close(pidfd)


async def wait_gone(process: ProcessName) -> None:
    """Returns once this very process has ended with all its threads, be it a child of ours
    or not."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if not is_alive(process):
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)


def descendants(root_pid: int) -> list[ProcessName]:
    """Every living child of ``root_pid``, its children, and so on."""
    children: dict[int, list[ProcessName]] = {}
    for entry in os.listdir("/proc"):
        fields = _stat_fields(int(entry)) if entry.isdigit() else None
        if fields is not None and not _has_ended(fields):
            name = ProcessName(int(entry), int(fields[19]))
            children.setdefault(int(fields[1]), []).append(name)
    found: list[ProcessName] = []
    open_pids = [root_pid]
    while open_pids:
        for child in children.get(open_pids.pop(), []):
            found.append(child)
            open_pids.append(child.pid)
    return found
