"""What the reconciler asks of a backend: start one process, know its end.

One ``Started`` lives from ``starting`` over ``running`` to ``gone``. ``gone`` is
proved (by the kernel on this machine, by Ray on another), never inferred from
silence, because a replacement may take over what the old process held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. ``code`` is None where only its being gone is known."""

    code: int | None
    reason: str


class Started(Protocol):
    """One started process; owned by the reconciler until ``wait`` has returned."""

    @property
    def name(self) -> str:
        """Of this process and no other, the same to a controller that adopts it."""
        ...

    @property
    def is_placed(self) -> bool:
        """It has a place to run; False while it waits for one."""
        ...

    async def wait(self) -> Exit:
        """Returns once the process is proved gone. May be called once."""
        ...

    async def stop(self) -> None:
        """Asks it to finish what it has and end; does not wait for that."""
        ...

    async def kill(self) -> None:
        """Kills it at once, also when it is stopped or hangs; does not wait."""
        ...


class PoolBackend(Protocol):
    """Starts the processes of one or more pools."""

    async def open(self) -> None:
        """Returns once processes could be started. Raises UnavailableError when that fails;
        it may be asked for again then. ``start`` and ``adopt`` do it where nobody has."""
        ...

    async def wait_lost(self) -> str:
        """Returns once the backend itself can start nothing any more, saying why."""
        ...

    async def start(self, pool: str, worker_id: str) -> Started:
        """Raises BatonError when it cannot be started."""
        ...

    async def adopt(self) -> Mapping[str, Started]:
        """By worker id, what an earlier controller of this cluster started and what still
        runs; to be asked for before the first start. Raises BatonError."""
        ...

    async def close(self) -> bool:
        """Ends what the backend itself runs; every process it started is gone.

        Returns False when it could not: then this process must end without its
        libraries' own ends, which would hang or leave files behind.
        """
        ...
