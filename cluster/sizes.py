"""How large pools should be: what is wished, what is configured, which workers go.

Pure functions; the pool controller carries out what they say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from baton.config import BatonConfig
from baton.errors import InvalidRequestError
from baton.records import PoolWish, PoolWishes
from cluster.slots import SlotView

logger = logging.getLogger(__name__)


def configured_sizes(config: BatonConfig) -> dict[str, int]:
    return {name: pool.replicas for name, pool in config.pools.items()}


def wishes_of(config: BatonConfig, sizes: Mapping[str, int]) -> PoolWishes:
    """``sizes``, of every pool, as they are stored."""
    return PoolWishes(
        pools={
            name: PoolWish(role=pool.role, replicas=sizes[name], configured=pool.replicas)
            for name, pool in config.pools.items()
        }
    )


def sizes_to_begin_with(config: BatonConfig, stored: PoolWishes | None) -> dict[str, int]:
    """What was wished before, for each pool whose configuration still says what it said
    then; what is configured for all others."""
    sizes = configured_sizes(config)
    for name, wish in (stored.pools if stored else {}).items():
        pool = config.pools.get(name)
        if pool is None or (pool.role, pool.replicas) != (wish.role, wish.configured):
            logger.info("the configuration of pool %s has changed since its last wish", name)
            continue
        sizes[name] = min(wish.replicas, pool.max_replicas)
    if not _decodes(config, sizes):
        logger.warning("what was wished before leaves no decode worker; starting as configured")
        return configured_sizes(config)
    if (conflict := gpu_conflict(config, sizes)) is not None:
        logger.warning("what was wished before cannot be: %s; starting as configured", conflict)
        return configured_sizes(config)
    return sizes


def gpu_conflict(config: BatonConfig, sizes: Mapping[str, int]) -> str | None:
    """Why workers on such pools could take each other's GPU, in a sentence; None: they do not, or
    are meant to. Ray shows each process the GPUs that it has given it; plain processes all see the
    same, and share it where they are to hand over between them (``gpu_handoff``)."""
    engines = {name: config.for_pool(name).engine for name in config.pools}
    num_workers = sum(
        sizes[name]
        for name, engine in engines.items()
        if engine.device != "cpu" and "gpu_handoff" not in engine.experimental
    )
    if config.cluster.backend != "processes" or num_workers <= 1:
        return None
    return (
        f"{num_workers} workers whose engine.device is not cpu would take the same GPU: plain "
        "processes are given none each; use --backend ray with num_gpus in their pools, "
        "engine.device: cpu, or one worker"
    )


def _decodes(config: BatonConfig, sizes: Mapping[str, int]) -> bool:
    return any(sizes[name] > 0 for name, pool in config.pools.items() if pool.role == "decode")


def wished_sizes(
    config: BatonConfig, present: Mapping[str, int], wish: Mapping[str, Any]
) -> dict[str, int]:
    """``present`` sizes with ``wish`` in their place. Raises InvalidRequestError that names
    the pool, for a wish that cannot be met; nothing of it counts then."""
    for name, size in wish.items():
        pool = config.pools.get(name)
        if pool is None:
            known = ", ".join(config.pools)
            raise InvalidRequestError(
                f"there is no pool {name[:64]!r}; there are: {known}", param=name[:64]
            )
        if isinstance(size, bool) or not isinstance(size, int):
            raise InvalidRequestError(
                f"pool {name}: the number of workers should be an integer", param=name
            )
        if size < 0:
            raise InvalidRequestError(f"pool {name} cannot have {size} workers", param=name)
        if size > pool.max_replicas:
            raise InvalidRequestError(
                f"pool {name} may have at most {pool.max_replicas} workers "
                f"(pools.{name}.max_replicas), not {size}",
                param=name,
            )
    sizes = {**present, **wish}
    if (conflict := gpu_conflict(config, sizes)) is not None:
        raise InvalidRequestError(conflict, param=next(iter(wish), None))
    if not _decodes(config, sizes):
        raise InvalidRequestError(
            "that would leave no decode worker: every answer is decoded there; keep 1 or more",
            param=next((name for name in wish if config.pools[name].role == "decode"), None),
        )
    return sizes


def free_ids(pool: str, taken: Iterable[str], num: int) -> list[str]:
    """``num`` names of workers of ``pool``: the lowest numbers that nobody has."""
    used, index = set(taken), 0
    names: list[str] = []
    while len(names) < num:
        name = f"{pool}-{index}"
        if name not in used:
            names.append(name)
        index += 1
    return names


def index_of(worker_id: str) -> int:
    return int(worker_id.rpartition("-")[2])


def pool_of(worker_id: str, pools: Iterable[str]) -> str | None:
    """The pool that the name says; None for a name that we do not give."""
    pool, _, index = worker_id.rpartition("-")
    is_ours = pool in set(pools) and index.isascii() and index.isdecimal()
    return pool if is_ours else None


def who_leaves(
    slots: Sequence[SlotView],
    num: int,
    *,
    is_registered: Callable[[str], bool],
    is_outdated: Callable[[str], bool],
) -> list[str]:
    """``num`` of one pool's workers: those without a process first, then those that are
    not registered (they serve nobody yet, and may never), then those of another
    generation (no new gateway has a use for them), then the highest numbers."""
    ordered = sorted(
        slots,
        key=lambda s: (
            s.process is not None,
            is_registered(s.worker_id),
            not is_outdated(s.worker_id),
            -index_of(s.worker_id),
        ),
    )
    return [slot.worker_id for slot in ordered[:num]]
