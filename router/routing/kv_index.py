"""Which prefixes each worker's cache holds, as far as its events have told.

A hint: events are a step old, and what a decision will make a worker hold is
believed for a few seconds before its event comes. Every live worker's part is

1. STALE: nothing is known; numbered changes are ignored until a snapshot comes;
2. CURRENT: every event since the snapshot has been applied. A gap in the numbers, or
   more hashes than the worker has blocks, makes it STALE, and a snapshot is asked for.

A lost worker's part is dropped at once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.block_hash import HASH_BYTES
from baton.v1 import session_pb2 as pb

logger = logging.getLogger(__name__)

EXPECT_S = 5.0
"""How long a decision is believed without the event that it should lead to."""
ASK_AGAIN_S = 1.0
"""Pause between two requests for a snapshot of one worker."""


def unpack(packed: bytes) -> list[bytes]:
    """Single hashes out of a message's packed ones."""
    return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]


@dataclass(slots=True, eq=False)
class _Part:
    """One worker's: ``held`` and ``expected`` never have more than ``num_blocks`` each."""

    num_blocks: int
    current: bool = False
    sequence: int = 0
    """Of the last event that was seen."""
    asked_at: float | None = None
    held: set[bytes] = field(default_factory=set)
    expected: OrderedDict[bytes, float] = field(default_factory=OrderedDict)
    """Hashes and when to give them up, soonest first."""


class KvIndex:
    """Workers are named by their epochs. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._parts: dict[bytes, _Part] = {}

    def join(self, epoch: bytes, *, num_blocks: int) -> None:
        """A new Session with a worker of that many blocks: its numbers begin anew."""
        self._parts[epoch] = _Part(num_blocks)

    def forget(self, epoch: bytes) -> None:
        """The worker is lost, and all that is known of it. Idempotent."""
        self._parts.pop(epoch, None)

    def take(self, epoch: bytes, events: pb.CacheEvents) -> bool:
        """Applies a worker's events. True: ask the worker for a snapshot.

        Events that have been applied already, and those of workers that have not
        joined, do nothing.
        """
        part = self._parts.get(epoch)
        if part is None or events.sequence <= part.sequence:
            return False
        is_next = events.sequence == part.sequence + 1
        part.sequence = events.sequence
        if events.snapshot:
            part.current = True
            part.held.clear()
        elif not (part.current and is_next):
            return self._stale(part)
        removed, added = unpack(events.removed), unpack(events.added)
        part.held.difference_update(removed)
        part.held.update(added)
        for hash_ in (*removed, *added):
            part.expected.pop(hash_, None)
        return len(part.held) > part.num_blocks and self._stale(part)

    def _stale(self, part: _Part) -> bool:
        part.current = False
        part.held = set()
        now = self._clock()
        if part.asked_at is not None and now < part.asked_at + ASK_AGAIN_S:
            return False
        part.asked_at = now
        return True

    def expect(self, epoch: bytes, hashes: Sequence[bytes]) -> None:
        """A decision will make the worker hold these: they count as held for ``EXPECT_S``."""
        part = self._parts.get(epoch)
        if part is None:
            return
        expires_at = self._clock() + EXPECT_S
        for hash_ in hashes:
            if hash_ not in part.held:
                part.expected[hash_] = expires_at
                part.expected.move_to_end(hash_)
        while len(part.expected) > part.num_blocks:
            part.expected.popitem(last=False)

    def num_held_blocks(self, epoch: bytes, hashes: Sequence[bytes]) -> int:
        """How many of the leading blocks the worker holds, or soon will."""
        part = self._parts.get(epoch)
        if part is None:
            return 0
        self._expire(part)
        for number, hash_ in enumerate(hashes):
            if hash_ not in part.held and hash_ not in part.expected:
                return number
        return len(hashes)

    def _expire(self, part: _Part) -> None:
        now = self._clock()
        while part.expected and next(iter(part.expected.values())) <= now:
            part.expected.popitem(last=False)

    def num_indexed_blocks(self, epoch: bytes) -> int:
        """Blocks that the worker's events say it holds."""
        part = self._parts.get(epoch)
        return len(part.held) if part is not None else 0
