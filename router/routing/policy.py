"""Which workers take a choice. Prefill and decode are chosen together, here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from baton.config import RoutingConfig
from router.routing.input_hashes import InputHashes
from router.routing.kv_index import KvIndex
from router.workers.session import WorkerSession

BALANCE_WEIGHT = 0.1
BALANCE_HALF_LIFE_S = 30.0
"""Work that a worker was given lately makes it a little dearer, so that one hot prefix
(a system prompt that all share) does not pin everybody to the worker that had it first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair that was looked at: worker ids, and the cost in tokens of prefill."""

    prefill: str | None
    decode: str
    cost: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """Where one attempt goes; without a prefill worker, decode prefills by itself."""

    prefill: WorkerSession | None
    decode: WorkerSession
    candidates: tuple[Candidate, ...] = ()
    """The cheapest ones, cheapest first, where the policy counts costs."""


@dataclass(frozen=True, slots=True)
class PeerShare:
    """What other gateways gave one worker."""

    num_tokens: int = 0
    num_blocks: int = 0
    num_sequences: int = 0


class PeerLoad(Protocol):
    """What the gateways tell each other of their decisions."""

    def given(self, epoch: bytes, num_tokens: int, num_blocks: int) -> None:
        """This gateway decided; the others are to know."""
        ...

    def since(self, epoch: bytes, reported_at: float | None) -> PeerShare:
        """What the others gave that worker after that time on the event loop's clock; with
        None, all that has not expired."""
        ...


class RoutingPolicy(Protocol):
    """Chooses among workers that may all be given work."""

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        """None where there is no decode worker. Never pairs workers that do not fit.

        A decode worker with a prefill partner goes before one without: disaggregation
        is what keeps its other streams' token gaps short. The attempt is made at
        once: a policy may count it from here on.
        """
        ...


def pairings(prefill: Sequence[WorkerSession], decode: Sequence[WorkerSession]) -> list[Pairing]:
    """Every pair of one digest and generation; of decode workers alone where there is none."""
    pairs = [Pairing(p, d) for d in decode for p in prefill if _fit(p, d)]
    return pairs or [Pairing(None, session) for session in decode]


def _fit(prefill: WorkerSession, decode: WorkerSession) -> bool:
    one, other = prefill.record, decode.record
    return (one.digest, one.generation) == (other.digest, other.generation)


# ------------------------------------------------- policies that know no blocks

Choose = Callable[[Sequence[WorkerSession]], WorkerSession]


class OneByOne:
    """Chooses a decode worker, then a prefill worker for it, by the same rule.

    ``choose`` is given workers without repetition, at least one.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        pairs = pairings(prefill, decode)
        if not pairs:
            return None
        chosen = self._choose(list({pair.decode: None for pair in pairs}))
        partners = [p.prefill for p in pairs if p.decode is chosen and p.prefill is not None]
        return Pairing(self._choose(partners) if partners else None, chosen)


def least_loaded(rng: random.Random) -> RoutingPolicy:
    """The workers with the fewest sequences, drawn from the equal ones."""

    def choose(sessions: Sequence[WorkerSession]) -> WorkerSession:
        least = min(session.num_sequences for session in sessions)
        return rng.choice([s for s in sessions if s.num_sequences == least])

    return OneByOne(choose)


def round_robin() -> RoutingPolicy:
    """The workers whose last turn was longest ago, newcomers first."""
    turns: WeakKeyDictionary[WorkerSession, int] = WeakKeyDictionary()

    def choose(sessions: Sequence[WorkerSession]) -> WorkerSession:
        chosen = min(sessions, key=lambda s: (turns.get(s, 0), s.record.worker_id))
        turns[chosen] = 1 + max(turns.values(), default=0)
        return chosen

    return OneByOne(choose)


def uniformly_random(rng: random.Random) -> RoutingPolicy:
    """Any worker."""
    return OneByOne(rng.choice)


# ------------------------------------------------------------------- kv_aware


@dataclass(slots=True, eq=False)
class _Given:
    """What this gateway's decisions gave one worker."""

    report: object = None
    """The one after which ``num_tokens`` and ``num_blocks`` were decided."""
    num_tokens: int = 0
    num_blocks: int = 0
    recent: float = 0.0
    """Tokens, halved every ``BALANCE_HALF_LIFE_S``."""
    recent_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """One worker before one choice, in tokens."""

    num_missing: int
    """Of the input, what it does not hold."""
    num_waiting: int
    """Input tokens that it has yet to compute for others."""
    num_in_use: int
    """Tokens' worth of blocks that sequences hold."""
    recent: float
    """What it was given lately, decaying."""


class KvAware:
    """The cheapest pair by what its workers hold and do, drawn from the equal ones."""

    def __init__(
        self,
        config: RoutingConfig,
        index: KvIndex,
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._index = index
        self._rng = rng
        self._clock = clock
        self._given: WeakKeyDictionary[WorkerSession, _Given] = WeakKeyDictionary()

    def cost(self, prefill: Standing | None, decode: Standing) -> float:
        """What the choice costs on a pair, in tokens of prefill::

              missing on prefill + waiting there                   computed before its first token
            + decode_block_weight × tokens in use on decode        its batch, and the room it has
            + transfer_weight × missing on decode                  moved by the hand-off
            + BALANCE_WEIGHT × (recent on prefill + transfer_weight × recent on decode)

        A decode worker alone computes what it misses, and nothing is moved.
        """
        weight = self._config.transfer_weight if prefill is not None else 0.0
        computing = prefill or decode
        return (
            computing.num_missing
            + computing.num_waiting
            + self._config.decode_block_weight * decode.num_in_use
            + weight * decode.num_missing
            + BALANCE_WEIGHT * (computing.recent + weight * decode.recent)
        )

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        pairs = pairings(prefill, decode)
        if not pairs:
            return None
        standings = {s: self._standing(input_, s) for s in (*prefill, *decode)}
        costs = [
            self.cost(standings[pair.prefill] if pair.prefill else None, standings[pair.decode])
            for pair in pairs
        ]
        least = min(costs)
        chosen = self._rng.choice(
            [pair for pair, cost in zip(pairs, costs, strict=True) if cost == least]
        )
        for session in (chosen.prefill, chosen.decode):
            if session is not None:
                computes = session is (chosen.prefill or chosen.decode)
                self._count(input_, session, standings[session], computes=computes)
        return chosen

    def _standing(self, input_: InputHashes, session: WorkerSession) -> Standing:
        size = session.record.block_size
        num_held = self._index.num_held_blocks(session.epoch, input_.of(session)) * size
        given = self._given_to(session)
        report = session.report
        num_waiting = report.num_waiting_tokens if report is not None else 0
        num_in_use = report.blocks.referenced if report is not None else 0
        return Standing(
            num_missing=input_.num_tokens - num_held,
            num_waiting=num_waiting + given.num_tokens,
            num_in_use=(num_in_use + given.num_blocks) * size,
            recent=given.recent,
        )

    def _given_to(self, session: WorkerSession) -> _Given:
        """Decisions count as load until the worker's next report, which knows of them."""
        given = self._given.setdefault(session, _Given())
        if given.report is not session.report:
            given.report = session.report
            given.num_tokens = given.num_blocks = 0
        now = self._clock()
        given.recent *= 0.5 ** ((now - given.recent_at) / BALANCE_HALF_LIFE_S)
        given.recent_at = now
        return given

    def _count(
        self, input_: InputHashes, session: WorkerSession, standing: Standing, *, computes: bool
    ) -> None:
        given = self._given_to(session)
        if computes:
            given.num_tokens += standing.num_missing
        given.num_blocks += -(-input_.num_tokens // session.record.block_size)
        given.recent += standing.num_missing
        self._index.expect(session.epoch, input_.of(session))


def make_policy(
    config: RoutingConfig,
    index: KvIndex,
    rng: random.Random,
    clock: Callable[[], float],
    peers: PeerLoad | None = None,
) -> RoutingPolicy:
    """The policy that the configuration names; ``clock`` gives seconds."""
    if config.policy == "round_robin":
        return round_robin()
    if config.policy == "least_loaded":
        return least_loaded(rng)
    if config.policy == "random":
        return uniformly_random(rng)
    return KvAware(config, index, rng, clock)
