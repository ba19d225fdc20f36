"""Environments as the images have them: made by the install script, once for a test run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALL_S = 600.0


class Installed:
    """The environments below ``folder``, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def environment(self, kind: str) -> Path:
        """The folder of a ``gateway``, ``worker-cpu`` or ``worker-cuda``, with the
        embedded model."""
        into = self._folder / kind
        if not into.exists():
            command = [sys.executable, "deploy/install.py", kind, "--embedded-model"]
            done = subprocess.run(
                [*command, "--into", str(into)],
                cwd=ROOT,
                # Of 30,000 files some hundred are imported: those are compiled then.
                env=bare_environment({"PIP_NO_COMPILE": "1"}),
                capture_output=True,
                text=True,
                timeout=INSTALL_S,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        return into

    def run(self, kind: str, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """``command``, its first word looked up in that environment, far from the checkout."""
        folder = self.environment(kind)
        return subprocess.run(
            [str(folder / "bin" / command[0]), *command[1:]],
            cwd=self._folder,
            env=bare_environment(more),
            capture_output=True,
            text=True,
            timeout=60,
        )


def bare_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything that leads to the checkout."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**own, **(more or {})}
