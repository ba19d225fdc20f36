"""The backend of plain local processes: each a child of this one, its output in a file."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import UnavailableError
from cluster import bound_child
from cluster.backend import Exit
from cluster.procfs import ProcessName, name_of, send, wait_gone


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. ``environment`` is added to this process's own."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def describe_status(status: int) -> str:
    """An exit status as ``subprocess`` gives it (negative: a signal), in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


class LocalProcess:
    """A child process. ``wait`` reaps it."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        self._name = name_of(child.pid)  # None: it ended already and is a zombie

    @property
    def name(self) -> str:
        start_time = self._name.start_time if self._name is not None else "?"
        return f"{self._child.pid}/{start_time}"

    @property
    def over(self) -> bool:
        return self._child.returncode is not None

    @property
    def is_placed(self) -> bool:
        return True

    async def wait(self) -> Exit:
        if self._name is not None:
            await wait_gone(self._name)
        status = self._child.wait()
        return Exit(status, describe_status(status))

    async def stop(self) -> None:
        self._signal(signal.SIGTERM)

    async def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._name is not None:
            send(self._name, number)


class ProcessesBackend:
    """Starts what ``command`` says for a name (a pool's, or a role's) and a worker id.

    Every child has a session of its own (a Ctrl-C of the terminal is for the
    launcher alone) and is killed by the kernel when this process dies.
    ``on_started`` hears of each; where it raises, the child is ended and ``start``
    raises that. Starts must come from a thread that lives as long as this process
    does: the kernel watches the thread.
    """

    def __init__(
        self,
        command: Callable[[str, str], Command],
        *,
        log_folder: Path,
        on_started: Callable[[ProcessName], None] = lambda _: None,
    ) -> None:
        self._command = command
        self._log_folder = log_folder
        self._on_started = on_started
        self._children: list[LocalProcess] = []

    async def open(self) -> None:
        """There is nothing to open."""

    async def start(self, pool: str, worker_id: str) -> LocalProcess:
        try:
            child = self._spawn(self._command(pool, worker_id), worker_id)
        except OSError as error:
            raise UnavailableError(f"cannot start {worker_id}: {error}") from error
        process = LocalProcess(child)
        self._children = [each for each in self._children if not each.over] + [process]
        try:
            if (name := name_of(child.pid)) is not None:
                self._on_started(name)
        except Exception:  # whoever is not told of this child would start another beside it
            await process.kill()
            await process.wait()
            raise
        return process

    def _spawn(self, command: Command, worker_id: str) -> subprocess.Popen[bytes]:
        wrapper = [sys.executable, "-I", "-S", bound_child.__file__, str(os.getpid())]
        with (self._log_folder / f"{worker_id}.log").open("ab") as log:
            return subprocess.Popen(
                [*wrapper, *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
                start_new_session=True,
            )

    async def wait_lost(self) -> str:
        """Never: there is nothing but this process itself."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def adopt(self) -> Mapping[str, LocalProcess]:
        """None: the children of an earlier process died with it."""
        return {}

    async def close(self) -> bool:
        """Kills what nobody has stopped."""
        left = [child for child in self._children if not child.over]
        for child in left:
            await child.kill()
        for child in left:
            await child.wait()
        return True
