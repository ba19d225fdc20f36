"""What runs inside a Ray actor: one worker, as its own ``main.serve`` has it.

Ray is not imported here. The actor is threaded: ``run`` occupies one thread for
the worker's whole life, with an event loop of the worker's own, so that Ray's
calls and the worker's loop do not wait for each other.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.procfs import ProcessName, name_of, wait_gone

MAX_CONCURRENCY = 4
"""Threads of the actor: one for ``run``, the others for calls meanwhile."""

logger = logging.getLogger(__name__)


def machine_id() -> str:
    """Equal in two processes that see the same pids of the same boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True, slots=True)
class Place:
    """Which process, on which machine."""

    process: ProcessName
    machine: str

    @classmethod
    def here(cls) -> Place:
        process = name_of(os.getpid())
        assert process is not None
        return cls(process, machine_id())

    @property
    def is_local(self) -> bool:
        return self.machine == machine_id()


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """Everything that one worker needs. It holds secrets: never logged."""

    role: str
    worker_id: str
    config: Mapping[str, Any]
    secret: str = field(repr=False)
    redis_url: str = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    log_file: str
    owner: Place
    """The launcher; a worker on its machine dies with it."""


def _redirect_output(log_file: str) -> None:
    """Everything that this process writes from now on goes to ``log_file``."""
    path = Path(log_file)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)


class _Life:
    """One worker on an event loop of its own. Apart from the actor's class, where
    Ray takes a single coroutine for the wish to run everything on Ray's loop."""

    def __init__(self, start: WorkerStart) -> None:
        self._start = start
        self._guard = threading.Lock()
        self._stop_requested = False
        self._stopper: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    async def run(self) -> None:
        """From ``serve``'s start to its end. Raises what it raises."""
        from baton.config import parse_config

        start, stop = self._start, asyncio.Event()
        with self._guard:
            self._stopper = (asyncio.get_running_loop(), stop)
            if self._stop_requested:
                stop.set()
        watch = asyncio.create_task(_die_with(start.owner)) if start.owner.is_local else None
        serve = importlib.import_module(f"{start.role}_workers.main").serve
        try:
            await serve(
                parse_config(start.config),
                worker_id=start.worker_id,
                host="127.0.0.1",
                port=0,
                metrics_port=0,
                secret=start.secret,
                redis_url=start.redis_url,
                stop=stop,
            )
        finally:
            with self._guard:
                self._stopper = None
            if watch is not None:
                watch.cancel()

    def stop(self) -> None:
        """Asks for the end; from any thread, at any time."""
        with self._guard:
            self._stop_requested = True
            if self._stopper is not None:
                loop, stop = self._stopper
                loop.call_soon_threadsafe(stop.set)


async def _die_with(owner: Place) -> None:
    await wait_gone(owner.process)
    logger.error("the launcher has died; so does this worker")
    os.kill(os.getpid(), signal.SIGKILL)


class WorkerActor:
    """The actor's class; made by Ray with a ``WorkerStart``. No method is a coroutine."""

    def __init__(self, start: WorkerStart) -> None:
        self._worker_id = start.worker_id
        self._life = _Life(start)
        _redirect_output(start.log_file)
        # Before anything loads torch, whose OpenMP reads its settings once.
        os.environ.update(start.environment)

    def place(self) -> Place:
        """Which process this is."""
        return Place.here()

    def run(self) -> None:
        """The worker's whole life. Raises what ended it, when that was a failure."""
        import uvloop

        from baton.logs import configure

        configure(self._worker_id)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._life.run())
        except Exception:
            logger.exception("%s failed", self._worker_id)
            raise

    def stop(self) -> None:
        """Asks the worker to drain and end; ``run`` returns when it has."""
        self._life.stop()
