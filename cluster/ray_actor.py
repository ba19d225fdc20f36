"""What runs inside a Ray actor: one worker, as its own ``main.serve`` has it.

Ray is not imported here. The actor is threaded, and the worker lives on a thread
with an event loop of its own, so that Ray's calls and the worker's loop do not
wait for each other.

1. PLACED: the process is there, and has told Ray's store which one it is.
2. LIVING: from ``begin`` on. Nobody's call is this life: callers may come and go.
3. OVER: it ended, or nobody began it within ``BEGIN_S``. How is told to whoever asks
   (``wait_end``) for ``LINGER_S``; then the process ends by itself.

A worker that is ended before ``begin`` has held nothing that others could miss.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.procfs import ProcessName, is_alive, name_of, wait_gone

MAX_CONCURRENCY = 8
"""Threads for calls. A caller that has died leaves one behind for ``END_POLL_S``."""
END_POLL_S = 10.0
"""How long one ``wait_end`` waits."""
LINGER_S = 15.0
BEGIN_S = 60.0
"""A controller begins what is placed at once. One that takes over may first wait for the
lease of a dead one to run out, and for a connection: half a minute. Who has not been begun
after this long was placed for nobody, and takes room from others."""

logger = logging.getLogger(__name__)


def machine_id() -> str:
    """Equal in two processes that see the same pids of the same boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True, slots=True)
class Place:
    """Which process, on which machine, on which of Ray's nodes."""

    process: ProcessName
    machine: str
    node_id: str = ""

    @classmethod
    def here(cls, node_id: str = "") -> Place:
        process = name_of(os.getpid())
        assert process is not None
        return cls(process, machine_id(), node_id)

    @property
    def is_local(self) -> bool:
        return self.machine == machine_id()

    @property
    def is_proved_dead(self) -> bool:
        """The process was on this machine, and is no more."""
        if not self.is_local or is_alive(self.process):
            return False
        if Path(f"/proc/{self.process.pid}").exists():  # somebody else's by now, or a zombie
            return True
        try:
            os.kill(self.process.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # /proc may hide other users' processes
            pass
        return False

    def to_json(self) -> str:
        process = self.process
        return json.dumps([process.pid, process.start_time, self.machine, self.node_id])

    @classmethod
    def from_json(cls, text: str | bytes) -> Place:
        pid, start_time, machine, node_id = json.loads(text)
        return cls(ProcessName(pid, start_time), machine, node_id)


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """What makes one worker. Ray's GCS stores it, also in its Redis: no secret is in here."""

    role: str
    pool: str
    worker_id: str
    config: Mapping[str, Any]
    environment: Mapping[str, str] = field(repr=False)
    """Takes the place of what the node says."""
    log_file: str | None = None
    """None: Ray keeps what it writes, as it does with every actor."""
    owner: Place | None = None
    """The launcher; a worker on its machine dies with it."""


@dataclass(frozen=True, slots=True)
class WorkerSecrets:
    """What a worker is told as it begins, by a call, which Ray stores nowhere. Never logged."""

    secret: str = field(repr=False)
    redis_url: str = field(repr=False)
    defaults: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment that the node's own has precedence over. Nobody knows what is secret there."""


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

    async def run(self, secrets: WorkerSecrets) -> None:
        """From ``serve``'s start to its end. Raises what it raises."""
        from baton.config import parse_config
        from baton.worker.process import live

        start, stop = self._start, asyncio.Event()
        with self._guard:
            self._stopper = (asyncio.get_running_loop(), stop)
            if self._stop_requested:
                stop.set()
        owner = start.owner
        bound = owner is not None and owner.is_local
        watch = asyncio.create_task(_die_with(owner)) if owner is not None and bound else None
        try:
            await live(
                importlib.import_module(f"{start.role}_workers.main").serve,
                parse_config(start.config),
                role=start.role,
                pool=start.pool,
                worker_id=start.worker_id,
                secret=secrets.secret,
                redis_url=secrets.redis_url,
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


def _exit_soon() -> None:
    """Somebody may still ask how it ended; nobody has to come and end this process."""
    time.sleep(LINGER_S)
    os._exit(0)


class WorkerActor:
    """The actor's class; made by Ray. No method is a coroutine.

    Args:
        note_place: tells Ray's store which process this is, and returns that.
        after_end: called on a thread of the actor's own when its life is over.
    """

    def __init__(
        self,
        start: WorkerStart,
        note_place: Callable[[], Place],
        after_end: Callable[[], None] = _exit_soon,
    ) -> None:
        self._worker_id = start.worker_id
        self._life = _Life(start)
        self._after_end = after_end
        self._guard = threading.Lock()
        self._begun = False
        self._over = threading.Event()
        self._failure: str | None = None
        if start.log_file is not None:
            _redirect_output(start.log_file)
        # Before anything loads torch, whose OpenMP reads its settings once.
        os.environ.update(start.environment)
        self._place = note_place()
        self._waiting = threading.Timer(BEGIN_S, self._end_unbegun)
        self._waiting.daemon = True
        self._waiting.start()

    def place(self) -> str:
        """Which process this is, as ``Place.from_json`` reads it."""
        return self._place.to_json()

    def begin(self, secrets: WorkerSecrets) -> None:
        """Begins the worker's life; again, or too late, does nothing."""
        if not self._begin_once():
            return
        self._waiting.cancel()
        # As early as the environment of ``start``: nothing of the worker is loaded yet.
        for name, value in secrets.defaults.items():
            os.environ.setdefault(name, value)
        threading.Thread(target=self._run, args=(secrets,), name="worker", daemon=True).start()

    def _begin_once(self) -> bool:
        with self._guard:
            first, self._begun = not self._begun, True
            return first

    def _end_unbegun(self) -> None:
        if self._begin_once():
            self._failure = f"nobody has begun it within {BEGIN_S:g} s"
            logger.error("%s ends: %s", self._worker_id, self._failure)
            self._over.set()
            self._after_end()

    def _run(self, secrets: WorkerSecrets) -> None:
        import uvloop

        from baton.logs import configure

        configure(self._worker_id)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._life.run(secrets))
        except BaseException as error:
            logger.exception("%s failed", self._worker_id)
            self._failure = str(error).strip() or type(error).__name__
        self._over.set()
        self._after_end()

    def wait_end(self, timeout_s: float) -> str | None:
        """None: it has not ended within that time. Otherwise JSON: what failed, or null."""
        return json.dumps(self._failure) if self._over.wait(timeout_s) else None

    def stop(self) -> None:
        """Asks the worker to drain and end; ``wait_end`` tells when it has."""
        self._life.stop()
