"""What processes have of the machine that could outlive them: memory, files, sockets, children."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.procfs import ProcessName, descendants, is_alive

_MEMORY = "/memfd:baton-kv"


@dataclass(frozen=True, slots=True)
class Belongings:
    """Of one process, taken while it lived."""

    owner: str
    children: tuple[ProcessName, ...]
    files: frozenset[Path]
    """That it had open or mapped in the folders asked for, and in ``/dev/shm``."""
    sockets: frozenset[str]
    """Names of Unix sockets."""

    def left(self) -> list[str]:
        """What of it is still there, in words."""
        names = _socket_names().values()
        return [
            *(f"child {child.pid}" for child in self.children if is_alive(child)),
            *(f"file {file}" for file in self.files if file.exists()),
            *(f"socket {name}" for name in self.sockets if name in names),
        ]


def belongings(owner: str, pid: int, folders: Iterable[Path]) -> Belongings:
    """Of the process ``pid``, which goes by ``owner``. AssertionError where there is none."""
    links = _links(pid)
    assert links, f"{owner} is gone"
    roots = [Path("/dev/shm"), *folders]
    paths = {Path(name) for name in [*links, *_mapped(pid)] if name.startswith("/")}
    names = _socket_names()
    return Belongings(
        owner,
        tuple(descendants(pid)),
        frozenset(path for path in paths if any(path.is_relative_to(root) for root in roots)),
        frozenset(names[link] for link in links if link in names),
    )


def kv_memories(pids: Iterable[int]) -> set[str]:
    """KV pools that these processes have open or mapped, their own and their peers'."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if _MEMORY in line:
                    found.add(line.split()[4])
        for file in _files(pid):
            with contextlib.suppress(OSError):
                if os.readlink(file).startswith(_MEMORY):
                    found.add(str(file.stat().st_ino))
    return found


def unattached_segments() -> set[str]:
    """Ids of System V's shared memory that no process of the machine has attached."""
    known = Path("/proc/sysvipc/shm")
    header, *lines = known.read_text().splitlines() if known.exists() else [""]
    names = header.split()
    segments = [dict(zip(names, line.split(), strict=True)) for line in lines]
    return {segment["shmid"] for segment in segments if segment["nattch"] == "0"}


def _files(pid: int) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(Path(f"/proc/{pid}/fd").iterdir())
    return []


def _links(pid: int) -> list[str]:
    found = []
    for file in _files(pid):
        with contextlib.suppress(OSError):
            found.append(os.readlink(file))
    return found


def _mapped(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return [fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6]
    return []


def _socket_names() -> dict[str, str]:
    """Of every Unix socket of the machine that has one, by what descriptors link to."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    named = [fields for line in lines if len(fields := line.split(maxsplit=7)) == 8]
    return {f"socket:[{fields[6]}]": fields[7] for fields in named}
