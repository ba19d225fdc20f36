"""Named points in the code where a test can delay, stop or kill a process.

Nothing happens unless ``BATON_FAULTS_FILE`` names a JSON file when the process
starts. The file is read again at every hit, so that a test can change it while
the process runs::

    {"decode.receiving": {"action": "delay", "seconds": 1.5, "worker": "decode-0"}}

Actions: ``delay`` (seconds), ``stop`` (SIGSTOP to itself), ``kill`` (SIGKILL to
itself), ``fail`` (raise InternalError). ``worker`` limits it to one worker id,
``hit`` to one hit: the so manyth of that plan in a process, from 1 on; without
it every hit acts. ``reached`` names a file that is made when the point is hit,
before the action.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.errors import InternalError

POINTS = frozenset(
    {
        "gateway.admitted",  # a request holds its place, nothing is opened yet
        "decode.open",  # decode has read an Open, nothing is reserved
        "decode.reserved",  # blocks are reserved, the gateway does not know
        "prefill.greet",  # prefill has read PeerHello, nothing is answered
        "prefill.link",  # before prefill's end of a link is built: gloo's rendezvous
        "prefill.proceed",  # prefill may start
        "prefill.chunk",  # before each prefill step
        "prefill.offer",  # a chunk is announced
        "prefill.commit",  # before the commit record is sent
        "prefill.send",  # before each range is sent, where prefill sends by itself
        "prefill.release",  # prefill has read Release, the lease is not judged
        "prefill.released",  # before Release is acknowledged
        "prefill.freed",  # the hand-off is over, its blocks are not given back
        "decode.greet",  # before PeerHello is sent
        "decode.link",  # decode has read PeerWelcome, nothing is mapped or connected
        "decode.attach",  # before the transfer is attached
        "decode.copy",  # before each range is copied
        "decode.release",  # every byte is copied, Release not sent
        "decode.released",  # decode has read the acknowledgement, its lease is not judged
        "decode.adopt",  # the blocks are good, the batch does not have them
        "decode.step",  # before each decode step
        # Where a prefill worker pulls what decode lends, those of a hand-off that are of both:
        "lend.greet",
        "lend.link",
        "lend.offer",
        "lend.commit",
        "lend.send",
        "lend.release",
        "lend.released",
        "pull.greet",
        "pull.link",
        "pull.attach",
        "pull.copy",
        "pull.release",
        "pull.released",
    }
)


def _parts(prefix: str) -> list[str]:
    points = (point.partition(".") for point in POINTS)
    return [name for room, _, name in points if room == prefix]


class Faults:
    """One process's fault points; made once, by its composition root."""

    def __init__(
        self, path: Path | None, worker_id: str, *, names: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._worker_id = worker_id
        self._names = names or {}
        self._counting = threading.Lock()
        self._hits: dict[str, tuple[dict[str, Any], int]] = {}

    @classmethod
    def from_environment(cls, worker_id: str) -> Faults:
        path = os.environ.get("BATON_FAULTS_FILE")
        return cls(Path(path) if path else None, worker_id)

    def named(self, old: str, new: str) -> Faults:
        """The same plan for code that acts in another part here: its points ``old.*`` are
        ``new.*``."""
        names = {f"{old}.{one}": f"{new}.{one}" for one in _parts(new)}
        return Faults(self._path, self._worker_id, names=names)

    def _planned(self, point: str) -> dict[str, Any] | None:
        if point not in POINTS:
            raise InternalError(f"no fault point is named {point!r}")
        if self._path is None or not self._path.exists():
            return None
        plan: dict[str, Any] | None = json.loads(self._path.read_text() or "{}").get(point)
        if plan is None or plan.get("worker", self._worker_id) != self._worker_id:
            return None
        if "hit" in plan and self._count(point, plan) != plan["hit"]:
            return None
        return plan

    def _count(self, point: str, plan: dict[str, Any]) -> int:
        """Of the hits under this plan, the present one's number."""
        with self._counting:
            before, number = self._hits.get(point, (plan, 0))
            number = number + 1 if before == plan else 1
            self._hits[point] = plan, number
            return number

    def _act(self, point: str, plan: dict[str, Any]) -> float:
        """Seconds still to wait, after everything that is not a delay."""
        if reached := plan.get("reached"):
            Path(reached).touch()
        if plan["action"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if plan["action"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if plan["action"] == "fail":
            raise InternalError(f"fault injected at {point}")
        return float(plan.get("seconds", 0.0)) if plan["action"] == "delay" else 0.0

    def hit(self, point: str) -> None:
        """For threads. Costs an attribute look-up where no faults are planned."""
        point = self._names.get(point, point)
        if self._path is not None and (plan := self._planned(point)) is not None:
            time.sleep(self._act(point, plan))

    async def wait(self, point: str) -> None:
        """For coroutines; a delay leaves the event loop running."""
        point = self._names.get(point, point)
        if self._path is not None and (plan := self._planned(point)) is not None:
            await asyncio.sleep(self._act(point, plan))
