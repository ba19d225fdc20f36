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
from router.routing.peers import NoPeers, PeerLoad, PeerShare
from router.routing.simple_policies import least_loaded, round_robin, uniformly_random

__all__ = [
    "Candidate",
    "NoPeers",
    "Pairing",
    "PeerLoad",
    "PeerShare",
    "RoutingPolicy",
    "make_policy",
    "pairings",
]


def make_policy(
    config: RoutingConfig,
    index: KvIndex,
    rng: random.Random,
    clock: Callable[[], float],
    peers: PeerLoad | None = None,
) -> RoutingPolicy:
    """The policy that the configuration names; ``clock`` gives seconds.

    Without ``peers`` this gateway is alone.
    """
    peers = peers if peers is not None else NoPeers()
    if config.policy == "round_robin":
        return round_robin(peers)
    if config.policy == "least_loaded":
        return least_loaded(rng, peers)
    if config.policy == "random":
        return uniformly_random(rng, peers)
    return KvAware(config, index, rng, clock, peers)
