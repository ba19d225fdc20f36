"""The launcher's end of its janitor (see ``janitor``)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster import janitor
from cluster.procfs import ProcessName


class Janitor:
    """A small process that outlives this one for a moment and cleans up after it."""

    def __init__(self, folder: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", janitor.__file__, str(folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def watch(self, process: ProcessName) -> None:
        """``process`` will be killed when this process has ended in whatever way."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{process.pid} {process.start_time}\n".encode())
        self._child.stdin.flush()

    def finish(self) -> None:
        """Has it clean up now; returns when that is done (bounded by the janitor)."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()
