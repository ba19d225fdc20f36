"""The cheapest workers by what their caches hold and what they have to do."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from baton.config import RoutingConfig
from router.routing.input_hashes import InputHashes
from router.routing.kv_index import KvIndex
from router.routing.pairing import Candidate, Pairing, pairings
from router.routing.peers import PeerLoad
from router.workers.session import WorkerSession

BALANCE_HALF_LIFE_S = 30.0
"""Of the memory of what a worker was given lately."""
MAX_CANDIDATES = 8
CONTINUED = 4
"""Times ``routing.local_prefill_max_tokens`` that a decode worker may prefill of a conversation
that it holds far more of than any prefill worker."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What is no setting: measured in ``benchmarks/routing``, and it matters little."""

    balance: float = 0.1
    """Work that a worker was given lately makes it a little dearer, so that one hot prefix
    (a system prompt that all share) does not pin everybody to the worker that had it first."""
    disturbance: float = 0.25
    """Of a token that a decode worker prefills, for each stream that waits for it meanwhile."""


DEFAULT_WEIGHTS = Weights()


@dataclass(slots=True, eq=False)
class _Recent:
    """What this gateway gave one worker lately."""

    num_tokens: float = 0.0
    """Halved every ``BALANCE_HALF_LIFE_S``."""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """One worker before one choice; all but ``num_sequences`` in tokens."""

    num_missing: int
    """Of the input, what it does not hold."""
    num_waiting: int
    """Input tokens that it has yet to compute for others."""
    num_in_use: int
    """Tokens' worth of blocks that sequences hold."""
    num_sequences: int
    """On it, running or waiting."""
    recent: float
    """What it was given lately, decaying."""


class KvAware:
    """The cheapest pairing, drawn from the equal ones."""

    def __init__(
        self,
        config: RoutingConfig,
        index: KvIndex,
        rng: random.Random,
        clock: Callable[[], float],
        peers: PeerLoad,
        *,
        weights: Weights = DEFAULT_WEIGHTS,
    ) -> None:
        self._config = config
        self._weights = weights
        self._index = index
        self._rng = rng
        self._clock = clock
        self._peers = peers
        self._recent: WeakKeyDictionary[WorkerSession, _Recent] = WeakKeyDictionary()

    def cost(self, prefill: Standing | None, decode: Standing) -> float:
        """What the choice costs on a pair, in tokens of prefill::

              missing on prefill − pulled + waiting there          computed before its first token
            + transfer_weight × pulled                             held by decode, which lends it
            + decode_block_weight × tokens in use on decode        its batch, and the room it has
            + transfer_weight × missing on decode                  moved by the hand-off
            + balance × (recent on prefill + transfer_weight × recent on decode)

        and on a decode worker alone, where nothing is moved::

              missing on decode + waiting there
            + decode_block_weight × tokens in use there
            + disturbance × missing × sequences there              their tokens come later
            + balance × recent there
        """
        in_use = self._config.decode_block_weight * decode.num_in_use
        if prefill is None:
            disturbance = self._weights.disturbance * decode.num_missing * decode.num_sequences
            recent = self._weights.balance * decode.recent
            return decode.num_missing + decode.num_waiting + in_use + disturbance + recent
        weight = self._config.transfer_weight
        num_pulled = self._num_pulled(prefill, decode)
        moved = weight * (decode.num_missing + num_pulled)
        recent = self._weights.balance * (prefill.recent + weight * decode.recent)
        num_computed = prefill.num_missing - num_pulled
        return num_computed + prefill.num_waiting + in_use + moved + recent

    def _num_pulled(self, prefill: Standing, decode: Standing) -> int:
        """Tokens that the prefill worker lacks and is to fetch from the decode worker."""
        lent = max(0, prefill.num_missing - decode.num_missing)
        return lent if self._config.prefill_pulls else 0

    def pick(
        self,
        input_: InputHashes,
        prefill: Sequence[WorkerSession],
        decode: Sequence[WorkerSession],
    ) -> Pairing | None:
        pairs = pairings(prefill, decode)
        if not pairs:
            return None
        standings = self._standings(input_, [*prefill, *decode])
        costs = [
            self.cost(standings[pair.prefill] if pair.prefill else None, standings[pair.decode])
            for pair in pairs
        ]
        alone = self._alone(input_, pairs, standings)
        pairs += [Pairing(None, session) for session in alone]
        costs += [self.cost(None, standing) for standing in alone.values()]
        least = min(costs)
        chosen = self._rng.choice(
            [pair for pair, cost in zip(pairs, costs, strict=True) if cost == least]
        )
        if chosen.prefill is None:
            standings |= alone
        num_computed = standings[chosen.computing].num_missing
        if chosen.prefill is not None:
            num_computed -= self._num_pulled(standings[chosen.prefill], standings[chosen.decode])
        for session in chosen.sessions:
            computed = num_computed if session is chosen.computing else 0
            self._count(input_, session, standings[session], computed)
        return Pairing(chosen.prefill, chosen.decode, _cheapest(pairs, costs))

    def _alone(
        self,
        input_: InputHashes,
        pairs: Sequence[Pairing],
        standings: Mapping[WorkerSession, Standing],
    ) -> dict[WorkerSession, Standing]:
        """Decode workers of ``pairs`` that may prefill by themselves, and how they stand for it:
        blocks that a hand-off is still to bring are missing to them."""
        limit = self._config.local_prefill_max_tokens
        if not limit:
            return {}
        partners: dict[WorkerSession, list[Standing]] = {}
        for pair in pairs:
            if pair.prefill is not None:
                partners.setdefault(pair.decode, []).append(standings[pair.prefill])
        alone = self._standings(input_, list(partners), or_soon=False)
        return {
            session: standing
            for session, standing in alone.items()
            if _may_prefill(standing.num_missing, partners[session], limit)
        }

    def _standings(
        self, input_: InputHashes, sessions: Sequence[WorkerSession], *, or_soon: bool = True
    ) -> dict[WorkerSession, Standing]:
        by_names: dict[int, list[WorkerSession]] = {}
        for session in sessions:  # those that name blocks alike share one list of hashes
            by_names.setdefault(id(input_.of(session)), []).append(session)
        standings: dict[WorkerSession, Standing] = {}
        for alike in by_names.values():
            epochs = [session.epoch for session in alike]
            held = self._index.leading_blocks(epochs, input_.of(alike[0]), or_soon=or_soon)
            for session in alike:
                standings[session] = self._standing(input_, session, held[session.epoch])
        return standings

    def _standing(
        self, input_: InputHashes, session: WorkerSession, num_held_blocks: int
    ) -> Standing:
        size = session.record.block_size
        given, report = session.given, session.report
        theirs = self._peers.since(session.epoch, session.load_at)
        num_waiting = report.num_waiting_tokens if report is not None else 0
        num_in_use = report.blocks.referenced if report is not None else 0
        return Standing(
            num_missing=input_.num_tokens - num_held_blocks * size,
            num_waiting=num_waiting + given.num_tokens + theirs.num_tokens,
            num_in_use=(num_in_use + given.num_blocks + theirs.num_blocks) * size,
            num_sequences=session.num_sequences + theirs.num_sequences,
            recent=self._recent_of(session).num_tokens,
        )

    def _recent_of(self, session: WorkerSession) -> _Recent:
        recent, now = self._recent.setdefault(session, _Recent()), self._clock()
        recent.num_tokens *= 0.5 ** ((now - recent.at) / BALANCE_HALF_LIFE_S)
        recent.at = now
        return recent

    def _count(
        self, input_: InputHashes, session: WorkerSession, standing: Standing, num_tokens: int
    ) -> None:
        """``num_tokens``: that it is to compute."""
        num_blocks = -(-input_.num_tokens // session.record.block_size)
        session.given.decided(num_tokens)
        self._recent_of(session).num_tokens += standing.num_missing
        self._peers.given(session.epoch, num_tokens, num_blocks)
        self._index.expect(session.epoch, input_.of(session))


def _may_prefill(num_missing: int, prefill: Sequence[Standing], limit: int) -> bool:
    """Whether a decode worker that lacks ``num_missing`` tokens may compute them.

    Few of them, if no prefill worker would come to the first token as soon: it lacks more, or
    is busy. Some more, if every prefill worker lacks twice as much or more: it has not seen the
    turns of the conversation that decode workers have computed, nor any answer.
    """
    num_computed = max(1, num_missing)  # an input that is held whole has its last token computed
    if num_computed <= limit:
        return num_missing < min(each.num_missing + each.num_waiting for each in prefill)
    is_some_more = num_computed <= CONTINUED * limit
    return is_some_more and 2 * num_missing <= min(each.num_missing for each in prefill)


def _cheapest(pairs: Sequence[Pairing], costs: Sequence[float]) -> tuple[Candidate, ...]:
    numbers = heapq.nsmallest(MAX_CANDIDATES, range(len(pairs)), key=costs.__getitem__)
    return tuple(
        Candidate(
            prefill=prefill.record.worker_id if (prefill := pairs[n].prefill) else None,
            decode=pairs[n].decode.record.worker_id,
            cost=costs[n],
        )
        for n in numbers
    )
