"""The launcher's end of its janitor (see ``janitor``).

A janitor that dies is replaced by one that is told all that it knew: at once where
``keep`` runs, else when there is something to tell. The last clean-up is done here where
there is none to do it.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cluster import janitor
from cluster.procfs import ProcessName, is_alive, name_of, wait_gone

logger = logging.getLogger(__name__)

_FINISH_S = janitor.PATIENCE_S + 2.0
"""A janitor that has not cleaned up by then is stopped, or in the kernel's hands."""
_RETRY_S = 1.0
"""Between two looks after a janitor that ends again and again."""


class Janitor:
    """A small process that outlives this one for a moment and cleans up after it."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError when no process can be started."""
        self._folder = folder
        self._watched: list[ProcessName] = []
        self._child = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", janitor.__file__, str(self._folder)],
            stdin=subprocess.PIPE,
            bufsize=0,  # what a dead one did not read must not be written again by ``close``
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the process that cleans up."""
        return self._child.pid

    def watch(self, process: ProcessName) -> None:
        """``process`` will be killed when this process has ended in whatever way. Never
        raises: what cannot be told now is told to the next janitor."""
        self._watched = [each for each in self._watched if is_alive(each)] + [process]
        try:
            self._tell([process])
        except OSError:
            self._replace()

    async def keep(self) -> None:
        """Replaces a janitor that has ended, until cancelled: this process may be killed
        before it has something to tell."""
        while True:
            child = self._child
            if (name := name_of(child.pid)) is not None:
                await wait_gone(name)
            if self._child is child:
                self._replace()
            await asyncio.sleep(_RETRY_S)

    def finish(self) -> None:
        """Has it clean up now; returns when that is done (bounded by the janitor)."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            status = self._child.wait(_FINISH_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            status = self._child.wait()
        if status != 0:
            logger.warning("the janitor did not clean up (status %d); doing so here", status)
            processes = [(each.pid, each.start_time) for each in self._watched]
            janitor.clean_up(processes, str(self._folder))

    def _tell(self, processes: Iterable[ProcessName]) -> None:
        assert self._child.stdin is not None
        for process in processes:
            self._child.stdin.write(f"{process.pid} {process.start_time}\n".encode())

    def _replace(self) -> None:
        dead, is_news = self._child, self._child.returncode is None
        dead.kill()
        status = dead.wait()
        if is_news:
            logger.warning("the janitor has ended (status %d); another takes its place", status)
        try:
            self._child = self._spawn()
            assert dead.stdin is not None
            dead.stdin.close()
            self._tell(self._watched)
        except OSError as error:
            if is_news:
                logger.error("there is no janitor, and none can be started: %s", error)
