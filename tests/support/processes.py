"""Processes that stand for containers: each with its own log, all gone at the end."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.procfs import ProcessName, descendants, is_alive, name_of, send

_MARK = "BATON_TEST_CONTAINERS"
_LISTENING = "0A"
GONE_S = 10.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run as: the whole environment is given."""

    arguments: Sequence[str]
    environment: Mapping[str, str]


class Processes:
    """Started by name. Whatever descends from them, orphans too, carries a mark in its
    environment, and is killed by that at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, launch: Launch) -> None:
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                list(launch.arguments),
                env={**launch.environment, _MARK: self._mark},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, launch: Launch, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """To its end, beside the others: a probe, a preStop. One that takes longer is killed
        and has failed with status 124."""
        try:
            return subprocess.run(
                list(launch.arguments),
                env={**launch.environment, _MARK: self._mark},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(list(launch.arguments), 124, "", "timed out")

    def check_alive(self) -> None:
        """AssertionError with the log of one that has ended by itself."""
        for name, process in self._running.items():
            assert process.poll() is None, f"{name} ended, {process.returncode}:\n{self.log(name)}"

    def stop(self, name: str, *, within_s: float) -> int:
        """As a container is stopped: SIGTERM, and its exit status once it has ended.
        AssertionError when that takes longer."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{name} did not end:\n{self.log(name)}") from None

    def log(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def logs(self) -> str:
        """All of them, for a failure's message."""
        return "\n".join(f"--- {name}\n{self.log(name)[-4000:]}" for name in self._running)

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def living(self) -> set[ProcessName]:
        """Every living process that descends from one of these. Redis and Ray's workers
        write their titles over their environments, so those are found as children."""
        wanted = f"{_MARK}={self._mark}".encode()
        found = {name for process in self._running.values() if (name := name_of(process.pid))}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            name = name_of(int(entry.name))
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if name is not None and wanted in environment:
                found |= {name, *descendants(name.pid)}
        return found

    def listening(self) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """Every address that one of these processes listens on."""
        sockets = {link for name in self.living() for link in _open_sockets(name.pid)}
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in sockets:
                    found.append(_address(fields[1].partition(":")[0]))
        return found

    def close(self) -> None:
        """Kills what is left; AssertionError should that not do."""
        ends_at = time.monotonic() + GONE_S
        left = self.living()
        while left := {name for name in left | self.living() if is_alive(name)}:
            for each in left:
                send(each, signal.SIGKILL)
            for process in self._running.values():
                process.poll()
            assert time.monotonic() < ends_at, f"still there: {left}"
            time.sleep(0.05)
        for process in self._running.values():
            process.wait()
        self._running.clear()


def _open_sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(file)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """As the kernel prints it: hexadecimal words, each in the machine's order."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """None is left when this ends. Their logs lie in ``folder``."""
    own = Processes(folder)
    try:
        yield own
    finally:
        own.close()


def base_environment() -> dict[str, str]:
    """What a container has of the machine: no setting of this process's."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ}
