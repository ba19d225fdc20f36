"""When, where and by which command figures were taken: what every report begins with."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_QUIET_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Measured:
    begun_at: str
    command: str
    revision: str
    processor: str
    cores: int
    gpus: int
    python: str
    load_average: float | None
    """Of the minute before; None where nobody looked."""

    @property
    def sentence(self) -> str:
        """Markdown. Says so where the machine was not quiet."""
        gpus = f"{self.gpus} GPUs" if self.gpus else "no GPU"
        busy = self.load_average or 0.0
        warning = (
            f" **The machine was not quiet before it began: load average {busy}.**"
            if busy > _QUIET_LOAD
            else ""
        )
        return (
            f"Measured {self.begun_at} at `{self.revision}` with `{self.command}` on {self.cores} "
            f"cores of {self.processor}, {gpus}, Python {self.python}.{warning}"
        )


def measured_now(command: str) -> Measured:
    """To be asked before the machine has anything to do."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return Measured(
        begun_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=command,
        revision=revision or "unknown",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        python=platform.python_version(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
