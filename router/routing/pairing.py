"""What a routing policy is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from router.routing.input_hashes import InputHashes
from router.workers.session import WorkerSession


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pairing that could have been chosen, by its workers' ids, and what it would cost."""

    prefill: str | None
    decode: str
    cost: float
    """In tokens of prefill."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Where one attempt goes; without a prefill worker, decode prefills by itself."""

    prefill: WorkerSession | None
    decode: WorkerSession
    candidates: tuple[Candidate, ...] = field(default=(), compare=False)
    """What it was chosen from, cheapest first, where the policy knows costs; not all of it."""

    @property
    def computing(self) -> WorkerSession:
        """The one that computes what is missing of the input."""
        return self.prefill or self.decode

    @property
    def sessions(self) -> tuple[WorkerSession, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)


class RoutingPolicy(Protocol):
    """Chooses among workers that may all be given work."""

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        """None where there is no decode worker. Never pairs workers that do not fit.

        A decode worker with a prefill partner goes before one without, except for what
        ``routing.local_prefill_max_tokens`` lets decode workers go on with by themselves:
        disaggregation is what keeps their other streams' token gaps short. The attempt
        is made at once: a policy may count it from here on.
        """
        ...


def pairings(prefill: Sequence[WorkerSession], decode: Sequence[WorkerSession]) -> list[Pairing]:
    """Every pair of one digest and generation; of decode workers alone where there is none."""
    pairs = [Pairing(p, d) for d in decode for p in prefill if _fit(p, d)]
    return pairs or [Pairing(None, session) for session in decode]


def kind_of(session: WorkerSession) -> tuple[str, str]:
    """What a prefill and a decode worker must have equal to be paired."""
    return session.record.digest, session.record.generation


def _fit(prefill: WorkerSession, decode: WorkerSession) -> bool:
    return kind_of(prefill) == kind_of(decode)
