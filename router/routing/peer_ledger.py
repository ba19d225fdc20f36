"""What other gateways have decided lately, and how they say so.

Times on the wire are wall-clock times and ages, because gateways do not share an event
loop's clock. Clocks that disagree do little harm: of the way between two gateways at
most ``MAX_TRANSIT_S`` is believed, and no decision outlives ``EXPIRE_S`` here.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from router.routing.policy import PeerShare

EXPIRE_S = 2.0
"""How long a decision counts. The worker's reports, each half a second, know of it by then,
unless an engine step takes longer."""
MAX_TRANSIT_S = 0.25
"""Of what the clocks say a message took, how much is taken for the way and not for skew."""
MAX_PER_WORKER = 4096
"""Decisions kept for one worker; beyond, the oldest give way."""
MAX_BATCH = 512
"""Decisions in one message."""

_Epoch = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Age = Annotated[float, Field(ge=0, le=3600)]
_Count = Annotated[int, Field(ge=0, le=2**40)]
_NOTHING = PeerShare()
_DECIDED_AT = itemgetter(0)


class Announcement(BaseModel):
    """One message: what a gateway gave to workers since its last one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    sender: str = Field(max_length=64)
    """Drawn by each process, so that one knows its own messages."""
    gateway_id: str = Field(max_length=256)
    sent_at: float
    """Unix time, seconds."""
    decisions: list[tuple[_Epoch, _Age, _Count, _Count]] = Field(max_length=MAX_BATCH)
    """Worker epoch, age in seconds when sent, tokens to compute, blocks."""


@dataclass(frozen=True, slots=True)
class Decision:
    """``decided_at`` is on the event loop's clock."""

    epoch: bytes
    decided_at: float
    num_tokens: int
    num_blocks: int


def announce(
    decisions: Sequence[Decision], *, sender: str, gateway_id: str, now: float, wall: float
) -> str:
    """The message that tells others; ``now`` is on the decisions' clock, ``wall`` Unix time."""
    return Announcement(
        sender=sender,
        gateway_id=gateway_id,
        sent_at=wall,
        decisions=[
            (one.epoch.hex(), max(0.0, now - one.decided_at), one.num_tokens, one.num_blocks)
            for one in decisions
        ],
    ).model_dump_json()


def decisions_of(said: Announcement, *, now: float, wall: float) -> list[Decision]:
    """What was said, on the clock of whoever has heard it at ``now``, Unix time ``wall``."""
    sent_at = now - min(max(0.0, wall - said.sent_at), MAX_TRANSIT_S)
    return [
        Decision(bytes.fromhex(epoch), sent_at - age_s, num_tokens, num_blocks)
        for epoch, age_s, num_tokens, num_blocks in said.decisions
    ]


class PeerLedger:
    """Bounded in time by ``EXPIRE_S``, in size by the workers that ``knows`` admits."""

    def __init__(self, clock: Callable[[], float], knows: Callable[[bytes], bool]) -> None:
        """``clock`` gives seconds; ``knows`` says whether an epoch is one of a worker here."""
        self._clock = clock
        self._knows = knows
        # By epoch: (decided at, tokens, blocks), in order of time.
        self._entries: dict[bytes, list[tuple[float, int, int]]] = {}
        self._swept_at = clock()

    @property
    def num_entries(self) -> int:
        return sum(map(len, self._entries.values()))

    def add(self, decisions: Sequence[Decision]) -> None:
        """Takes down what is of a known worker and has not expired."""
        now = self._clock()
        for one in decisions:
            if one.decided_at <= now - EXPIRE_S or not self._knows(one.epoch):
                continue
            entries = self._entries.setdefault(one.epoch, [])
            entry = (min(one.decided_at, now), one.num_tokens, one.num_blocks)
            insort(entries, entry, key=_DECIDED_AT)
            if len(entries) > MAX_PER_WORKER:
                del entries[0]
        if now - self._swept_at >= EXPIRE_S:
            self._swept_at = now
            self._sweep(now)

    def since(self, epoch: bytes, load_at: float | None) -> PeerShare:
        """The sum of what was decided for that worker after ``load_at`` and counts still."""
        entries = self._entries.get(epoch)
        if not entries:
            return _NOTHING
        after = self._clock() - EXPIRE_S
        if load_at is not None:
            after = max(after, load_at)
        counted = entries[bisect_right(entries, after, key=_DECIDED_AT) :]
        return PeerShare(
            num_tokens=sum(num_tokens for _, num_tokens, _ in counted),
            num_blocks=sum(num_blocks for _, _, num_blocks in counted),
            num_sequences=len(counted),
        )

    def _sweep(self, now: float) -> None:
        for epoch, entries in list(self._entries.items()):
            del entries[: bisect_right(entries, now - EXPIRE_S, key=_DECIDED_AT)]
            if not entries:
                del self._entries[epoch]
