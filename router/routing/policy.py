"""Which workers take a choice. Prefill and decode are chosen together.

The one that costs least by what its workers hold and do is found in ``kv_aware.py``;
``simple_policies.py`` has what it is compared with.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from baton.config import RoutingConfig
from router.routing.kv_aware import KvAware
from router.routing.kv_index import KvIndex
from router.routing.pairing import Candidate, Pairing, RoutingPolicy, pairings
from router.routing.peers import ALONE, NoPeers, PeerLoad, PeerShare
from router.routing.simple_policies import least_loaded, round_robin, uniformly_random

__all__ = [
    "Candidate",
    "NoPeers",
    "Pairing",
    "PeerLoad",
    "PeerShare",
    "RoutingPolicy",
    "least_loaded",
    "make_policy",
    "pairings",
    "round_robin",
    "uniformly_random",
]


def make_policy(
    config: RoutingConfig,
    index: KvIndex,
    rng: random.Random,
    clock: Callable[[], float],
    peers: PeerLoad = ALONE,
) -> RoutingPolicy:
    """The policy that the configuration names; ``clock`` gives seconds."""
    if config.policy == "round_robin":
        return round_robin(peers)
    if config.policy == "least_loaded":
        return least_loaded(rng, peers)
    if config.policy == "random":
        return uniformly_random(rng, peers)
    return KvAware(config, index, rng, clock, peers)
