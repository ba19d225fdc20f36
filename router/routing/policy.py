"""Which workers take a choice. Prefill and decode are chosen together, here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.workers.session import WorkerSession


@dataclass(frozen=True, slots=True)
class Pairing:
    """Where one attempt goes; without a prefill worker, decode prefills by itself."""

    prefill: WorkerSession | None
    decode: WorkerSession


class RoutingPolicy(Protocol):
    """Chooses among workers that may all be given work."""

    def pick(
        self, prefill: Sequence[WorkerSession], decode: Sequence[WorkerSession]
    ) -> Pairing | None:
        """None where there is no decode worker. Never pairs different digests."""
        ...


class LeastLoaded:
    """The pair with the fewest sequences on its workers, drawn from the equal ones.

    A decode worker with a prefill partner goes before one without: disaggregation
    is what keeps its other streams' token gaps short.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(
        self, prefill: Sequence[WorkerSession], decode: Sequence[WorkerSession]
    ) -> Pairing | None:
        partners: dict[str, list[WorkerSession]] = {}
        for session in prefill:
            partners.setdefault(session.record.digest, []).append(session)
        paired = [session for session in decode if session.record.digest in partners]
        chosen = self._least_loaded(paired or decode)
        if chosen is None:
            return None
        return Pairing(self._least_loaded(partners.get(chosen.record.digest, ())), chosen)

    def _least_loaded(self, sessions: Sequence[WorkerSession]) -> WorkerSession | None:
        least = min((session.num_sequences for session in sessions), default=None)
        if least is None:
            return None
        return self._rng.choice([s for s in sessions if s.num_sequences == least])
