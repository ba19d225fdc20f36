"""Policies that know no blocks: for comparison with ``kv_aware``.

They cannot know what a decode worker lacks of an input, so none of them ever has one
prefill by itself beside a prefill pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from router.routing.input_hashes import InputHashes
from router.routing.pairing import Pairing, RoutingPolicy, pairings
from router.routing.peers import ALONE, PeerLoad
from router.workers.session import WorkerSession

Choose = Callable[[Sequence[WorkerSession]], WorkerSession]


class OneByOne:
    """Chooses a decode worker, then a prefill worker for it, by the same rule.

    ``choose`` is given workers without repetition, at least one. Every choice is told
    to the other gateways as a sequence, with its input counted whole.
    """

    def __init__(self, choose: Choose, peers: PeerLoad) -> None:
        self._choose = choose
        self._peers = peers

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
        pairing = Pairing(self._choose(partners) if partners else None, chosen)
        for session in pairing.sessions:
            num_tokens = input_.num_tokens if session is pairing.computing else 0
            num_blocks = -(-input_.num_tokens // session.record.block_size)
            self._peers.given(session.epoch, num_tokens, num_blocks)
        return pairing


def least_loaded(rng: random.Random, peers: PeerLoad = ALONE) -> RoutingPolicy:
    """The workers with the fewest sequences, drawn from the equal ones."""

    def num_sequences(session: WorkerSession) -> int:
        theirs = peers.since(session.epoch, session.load_at).num_sequences
        return session.num_sequences + theirs

    def choose(sessions: Sequence[WorkerSession]) -> WorkerSession:
        loads = [num_sequences(session) for session in sessions]
        least = min(loads)
        return rng.choice([s for s, load in zip(sessions, loads, strict=True) if load == least])

    return OneByOne(choose, peers)


def round_robin(peers: PeerLoad = ALONE) -> RoutingPolicy:
    """The workers whose last turn was longest ago, newcomers first."""
    turns: WeakKeyDictionary[WorkerSession, int] = WeakKeyDictionary()

    def choose(sessions: Sequence[WorkerSession]) -> WorkerSession:
        chosen = min(sessions, key=lambda s: (turns.get(s, 0), s.record.worker_id))
        turns[chosen] = 1 + max(turns.values(), default=0)
        return chosen

    return OneByOne(choose, peers)


def uniformly_random(rng: random.Random, peers: PeerLoad = ALONE) -> RoutingPolicy:
    """Any worker."""
    return OneByOne(rng.choice, peers)
