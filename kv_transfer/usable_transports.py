"""Which transports are tried with a peer, and when one that has failed is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

RETRY_S = 60.0
"""After a first failure; after each further one twice as long."""
_MOST_RETRY_S = 3600.0
_MOST_PEERS = 256


@dataclass(slots=True)
class _Failure:
    why: str
    delay_s: float
    until: float
    is_over: bool = False
    """It is tried again, or has been."""


class UsableTransports:
    """Names, the best first. One that has failed is left out for a while: a probe that was lost,
    or a machine that was busy, must not keep two workers on a slower one for good."""

    def __init__(
        self, names: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = list(names)
        self._clock = clock
        self._failures: dict[str, _Failure] = {}

    def remove(self, name: str) -> None:
        """It cannot be used here."""
        self._names.remove(name)

    def leave_out(self, name: str, why: str) -> None:
        before = self._failures.get(name)
        delay_s = RETRY_S if before is None else min(2 * before.delay_s, _MOST_RETRY_S)
        self._failures[name] = _Failure(why, delay_s, self._clock() + delay_s)

    def works(self, name: str) -> None:
        """A link over it is up."""
        self._failures.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """Those to try now. What has failed long enough ago is among them, and no longer due."""
        for failure in self._failures.values():
            failure.is_over = failure.is_over or self._is_due(failure)
        return tuple(name for name in self._names if name not in self._left_out())

    def try_all(self) -> None:
        """None is left out until it fails again."""
        for failure in self._failures.values():
            failure.is_over = True

    @property
    def is_one_due(self) -> bool:
        """One that has failed may be tried again."""
        return any(map(self._is_due, self._failures.values()))

    @property
    def reason(self) -> str:
        """Why some are left out now; empty where none is."""
        return "; ".join(f"{name} failed: {each.why}" for name, each in self._left_out().items())

    def _left_out(self) -> dict[str, _Failure]:
        return {name: each for name, each in self._failures.items() if not each.is_over}

    def _is_due(self, failure: _Failure) -> bool:
        return not failure.is_over and self._clock() >= failure.until


class TransportsByPeer:
    """What is usable with each of the peers that were asked for last."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._by_peer: dict[Hashable, UsableTransports] = {}

    def of(self, peer: Hashable) -> UsableTransports:
        found = self._by_peer.pop(peer, None) or UsableTransports(self._names)
        self._by_peer[peer] = found
        while len(self._by_peer) > _MOST_PEERS:
            del self._by_peer[next(iter(self._by_peer))]
        return found
