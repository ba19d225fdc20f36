"""One place of a pool, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from cluster.backend import PoolBackend, Started

Cause = Literal["died", "fenced", "start_timeout"]
"""Why a process had to be replaced: by itself, or killed by us."""

STABLE_S = 30.0
"""A process that served this long did not die of its start."""
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0


def backoff_s(quick_deaths: int) -> float:
    """Delay before the next start, after so many quick deaths in a row."""
    if quick_deaths == 0:
        return 0.0
    return float(min(FIRST_DELAY_S * 2 ** min(quick_deaths - 1, 32), MAX_DELAY_S))


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """What the reconciler did or saw."""

    kind: Literal["started", "died", "stopped"]
    pool: str
    worker_id: str
    reason: str = ""
    retry_in_s: float = 0.0
    cause: Cause = "died"


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot as others may see it, at one moment."""

    pool: str
    worker_id: str
    process: Started | None
    """None while nothing runs, or it is being started. Another object for each process."""
    started_at: float
    """On the reconciler's clock; means nothing without a process."""
    adopted: bool
    """The process was started by an earlier controller."""
    leaving: bool


@dataclass(slots=True, eq=False)
class Slot:
    """Belongs to the reconciler alone."""

    pool: str
    worker_id: str
    backend: PoolBackend
    process: Started | None = None
    started_at: float = 0.0
    serves_since: float | None = None
    """None while it is still on its way to serve anybody."""
    adopted: bool = False
    life: asyncio.Task[None] | None = None
    quick_deaths: int = 0
    retry_at: float = 0.0
    leaving: bool = False
    kill_at: float | None = None
    """When the process is killed, unless it has ended before."""
    cause: Cause = "died"
    verdict: str = ""
    """Why we kill it, where we do."""

    def view(self) -> SlotView:
        return SlotView(
            self.pool, self.worker_id, self.process, self.started_at, self.adopted, self.leaving
        )
