"""Where one choice's time went, from its submission to its last token.

The moments come in this order; whoever lets them happen notes them::

    submitted ─queue─ admitted ─route─ opened ─room─ reserved ─prefill─ first ─decode─ last token
                          └───────<───────┴──────<──────┘ lost: an attempt without a token

A token's time is that of the message that brought it to the gateway, however late it is
read; tokens of one message arrive together. The steady time between tokens is the median
over the arrivals after the second token's, each gap divided by the number of tokens that
it brought.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAX_GAPS = 256
"""Gaps that the median is made of: the first ones."""
MIN_GAPS = 2
MAX_ATTEMPTS = 32
"""Attempts that are listed: the first half and the last."""


class Candidate(Protocol):
    """A pair of workers that routing looked at, and its cost in tokens of prefill."""

    @property
    def prefill(self) -> str | None: ...

    @property
    def decode(self) -> str: ...

    @property
    def cost(self) -> float: ...


@dataclass(slots=True, eq=False)
class AttemptTimes:
    """One attempt: who was to serve it and what came of it."""

    cause: str
    prefill: str | None
    decode: str
    candidates: Sequence[Candidate]
    opened_at: float
    reserved_at: float | None = None
    """When decode had room for it."""
    num_tokens: int = 0
    num_pulled_tokens: int = 0
    """Of the input, what prefill fetched from decode, so far as its account has come."""
    error: str | None = None
    """The code of what it ended with, unless it ended well."""


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


class Timeline:
    """One choice's; ``clock`` gives seconds, and so does whoever says when tokens arrived."""

    __slots__ = (
        "_attempts", "_clock", "_first", "_first_at", "_gaps", "_last_at", "_lost_s",
        "_num_left_out", "_num_tokens", "_pairing_at", "_queue_s", "_route_s", "_second",
        "_second_at", "_submitted_at",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._submitted_at = self._pairing_at = clock()
        self._queue_s: float | None = None
        self._route_s = self._lost_s = 0.0
        self._attempts: list[AttemptTimes] = []
        self._num_left_out = 0
        self._num_tokens = 0
        self._first: AttemptTimes | None = None
        self._second: AttemptTimes | None = None
        self._first_at = self._second_at = self._last_at = 0.0
        self._gaps = array("d")

    # ------------------------------------------------------------ moments

    def submitted(self) -> None:
        self._submitted_at = self._clock()

    def admitted(self) -> None:
        self._pairing_at = self._clock()
        self._queue_s = self._pairing_at - self._submitted_at

    def opened(
        self,
        cause: str,
        *,
        prefill: str | None,
        decode: str,
        candidates: Sequence[Candidate] = (),
    ) -> None:
        """An attempt was given to these workers."""
        now = self._clock()
        if self._num_tokens == 0:
            self._route_s += now - self._pairing_at
        if len(self._attempts) == MAX_ATTEMPTS:
            del self._attempts[MAX_ATTEMPTS // 2]
            self._num_left_out += 1
        self._attempts.append(AttemptTimes(cause, prefill, decode, candidates, now))

    def reserved(self, at: float) -> None:
        """The last attempt has its room on decode, since that time."""
        self._attempts[-1].reserved_at = at

    def pulled(self, num_tokens: int) -> None:
        """So many tokens of the last attempt's input went from decode to prefill."""
        self._attempts[-1].num_pulled_tokens = num_tokens

    def failed(self, error: str) -> None:
        """The last attempt ended with that code; another one is looked for from now on."""
        attempt = self._attempts[-1]
        attempt.error = error
        self._pairing_at = self._clock()
        if self._num_tokens == 0:
            self._lost_s += self._pairing_at - attempt.opened_at

    def arrived(self, num_tokens: int, at: float) -> None:
        """The last attempt has brought that many tokens, at least one, at that time."""
        attempt = self._attempts[-1]
        attempt.num_tokens += num_tokens
        if self._num_tokens >= 2:
            if len(self._gaps) < MAX_GAPS:
                self._gaps.append((at - self._last_at) / num_tokens)
        else:
            if self._num_tokens == 0:
                self._first, self._first_at = attempt, at
            if self._num_tokens + num_tokens >= 2:
                self._second, self._second_at = attempt, at
        self._num_tokens += num_tokens
        self._last_at = at

    # ------------------------------------------------------------- results

    @property
    def handoff_exposed_s(self) -> float | None:
        """What the hand-off added to the gap before the second token. None where there was
        none, where the attempt that gave the first token did not give the second, or where
        too few tokens came to know the steady gap."""
        first = self._first
        if first is None or first.prefill is None or first is not self._second:
            return None
        if len(self._gaps) < MIN_GAPS:
            return None
        return max(0.0, self._second_at - self._first_at - statistics.median(self._gaps))

    def report(self) -> dict[str, Any]:
        """For JSON: times in milliseconds, null for what has not happened."""
        first = self._first
        first_at = None if first is None else self._first_at
        room_s = prefill_s = None
        if first is not None:
            reserved_at = first.opened_at if first.reserved_at is None else first.reserved_at
            room_s, prefill_s = reserved_at - first.opened_at, self._first_at - reserved_at
        return {
            "attempts": [self._shown(attempt) for attempt in self._attempts],
            "num_attempts_left_out": self._num_left_out,
            "queue": _ms(self._queue_s),
            "route": _ms(self._route_s),
            "lost": _ms(self._lost_s),
            "room": _ms(room_s),
            "prefill": _ms(prefill_s),
            "handoff_exposed": _ms(self.handoff_exposed_s),
            "decode": _ms(None if first_at is None else self._last_at - first_at),
            "total": _ms(None if first_at is None else self._last_at - self._submitted_at),
        }

    def _shown(self, attempt: AttemptTimes) -> dict[str, Any]:
        return {
            "cause": attempt.cause,
            "prefill": attempt.prefill,
            "decode": attempt.decode,
            "opened": _ms(attempt.opened_at - self._submitted_at),
            "room": _ms(
                None if attempt.reserved_at is None else attempt.reserved_at - attempt.opened_at
            ),
            "num_tokens": attempt.num_tokens,
            "num_pulled_tokens": attempt.num_pulled_tokens,
            "error": attempt.error,
            "candidates": [
                {"prefill": one.prefill, "decode": one.decode, "cost": round(one.cost, 3)}
                for one in attempt.candidates
            ],
        }
