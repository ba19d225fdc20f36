"""`baton scale`: wishes for other pool sizes, and waits until the pools have them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from baton.errors import InvalidRequestError, UnavailableError
from cluster.console import Progress
from cluster.controller_client import ControllerAddress, PoolRow

_POLL_S = 0.2
_WORD = re.compile(r"([^=]+)=([0-9]{1,9})")


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """``["prefill=2"]`` as ``{"prefill": 2}``. Raises InvalidRequestError."""
    sizes: dict[str, int] = {}
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            raise InvalidRequestError(
                f"{word!r} is no wish; write POOL=N, with N 0 or more, as in decode=3"
            )
        pool, size = match.groups()
        if pool in sizes:
            raise InvalidRequestError(f"pool {pool} is named twice; name it once")
        sizes[pool] = int(size)
    return sizes


def scale(
    controller: ControllerAddress,
    sizes: Mapping[str, int],
    *,
    wait_s: float | None,
    progress: Progress,
) -> None:
    """Wishes for ``sizes`` and waits up to ``wait_s`` seconds, None for not at all.

    Raises BatonError: the wish was refused, another one came, or it takes longer.
    """
    pools = controller.wish(sizes)
    if wait_s is None:
        for name in sizes:
            progress.say(f"{name}: {pools[name].desired} wished; now {pools[name]}")
        return
    ends_at = time.monotonic() + wait_s
    said: dict[str, str] = {}
    with progress.waiting("scaling"):
        while True:
            _report(sizes, pools, said, progress)
            if all(pools[name].settled for name in sizes):
                return
            if time.monotonic() >= ends_at:
                raise UnavailableError(_too_slow(sizes, pools, wait_s))
            time.sleep(_POLL_S)
            pools = _polled(controller, pools)
            _check_unchanged(sizes, pools)


def _polled(controller: ControllerAddress, last: dict[str, PoolRow]) -> dict[str, PoolRow]:
    """A controller that is busy, or being replaced, may answer the next time."""
    try:
        return controller.pools()
    except UnavailableError:
        return last


def _check_unchanged(sizes: Mapping[str, int], pools: Mapping[str, PoolRow]) -> None:
    for name, size in sizes.items():
        if name not in pools or pools[name].desired != size:
            raise UnavailableError(f"somebody else has changed pool {name} meanwhile")


def _report(
    sizes: Mapping[str, int],
    pools: Mapping[str, PoolRow],
    said: dict[str, str],
    progress: Progress,
) -> None:
    """A line for each pool whose state is another than what was said last."""
    for name in sizes:
        if said.get(name) != str(pools[name]):
            said[name] = str(pools[name])
            progress.done(f"{name}: {said[name]}")
    progress.update("waiting for " + ", ".join(n for n in sizes if not pools[n].settled))


def _too_slow(sizes: Mapping[str, int], pools: Mapping[str, PoolRow], wait_s: float) -> str:
    parts = [f"{name}: {pools[name]}" for name in sizes if not pools[name].settled]
    return (
        f"not within {wait_s:g} s ({'; '.join(parts)}); the wish stands: see `baton status`, "
        "and the logs of its workers"
    )
