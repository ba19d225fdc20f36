"""The processes of a worker's ranks other than the first: children of this process.

Ranks live and die together. The kernel kills the children when this process dies, and
when a child dies this process ends itself at once: others may wait for that child in a
collective, and nothing that they have computed is of use without it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from baton.errors import ConfigurationError

logger = logging.getLogger(__name__)


def end_process(sentence: str) -> None:
    """Says why, and ends this process whatever its threads do."""
    logger.critical("%s; this worker ends", sentence)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(1)


class RankProcesses:
    """``num`` children, for ranks 1 to ``num``; ``connections`` are to them, in this order.

    ``on_death`` is called, on a thread, when one ends that nobody has closed.
    """

    def __init__(
        self,
        num: int,
        *,
        worker_id: str,
        on_death: Callable[[str], None] = end_process,
    ) -> None:
        self._worker_id = worker_id
        self._on_death = on_death
        self._closing = False
        self._failure: OSError | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._live, args=(num, started), name="ranks", daemon=True
        )
        self._thread.start()
        started.wait()
        if self._failure is not None:
            self.close()
            raise ConfigurationError(f"cannot start the ranks of {worker_id}: {self._failure}")

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children]

    def _live(self, num: int, started: threading.Event) -> None:
        """The thread that starts the children has to outlive them: the kernel takes its end
        for their parent's."""
        try:
            for rank in range(1, num + 1):
                self._start(rank)
        except OSError as error:
            self._failure = error
        started.set()
        poll, ranks = select.poll(), {}
        for rank, child in enumerate(self._children, start=1):
            descriptor = os.pidfd_open(child.pid)
            ranks[descriptor] = (rank, child)
            poll.register(descriptor, select.POLLIN)
        while ranks:
            for descriptor, _ in poll.poll():
                rank, child = ranks.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                status = child.wait()
                if not self._closing:
                    self._on_death(f"rank {rank} of {self._worker_id} {_in_words(status)}")

    def _start(self, rank: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "engine.parallel.rank_main"),
                    *("--name", f"{self._worker_id} rank {rank}"),
                    *("--leader", str(os.getpid())),
                    *("--connection", str(theirs.fileno())),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._children.append(child)
        self.connections.append(ours)

    def expect_end(self) -> None:
        """From here on their ends are nobody's death."""
        self._closing = True

    def close(self, *, timeout_s: float = 2.0) -> None:
        """Ends them: those that do not end by themselves within ``timeout_s`` are killed, as
        one that is stopped and those that wait for it in a collective have to be."""
        self.expect_end()
        for connection in self.connections:
            connection.close()
        self._thread.join(timeout_s)
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        self._thread.join()


def _in_words(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
