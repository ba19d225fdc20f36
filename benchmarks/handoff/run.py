"""How near does the hand-off come to copying memory, and what is it in an answer's time?

Two models' KV, 1k to 16k tokens of one request and of 16 at once, from a prefill process to a
decode process by the real protocol, over every transport that works here, in turn with the bounds:
memcpy over the same blocks, reading them by NIXL alone, and gathering, sending over bare gloo and
scattering them. Then the real model over HTTP.

    python -m benchmarks.handoff.run --rounds 3
    python -m benchmarks.handoff.run --report     # results into docs/, runs nothing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import httpx

from baton.config import KvTransferConfig
from baton.errors import BatonError
from benchmarks import page
from benchmarks.handoff import exposed, report
from benchmarks.handoff.cases import REQUESTS, TOKENS, Load, load_in
from benchmarks.handoff.decode_side import DecodeSide, Moved
from benchmarks.handoff.report import (
    BARE_GLOO,
    BARE_NIXL,
    CONTIGUOUS,
    MEMCPY,
    Beside,
    Results,
    Sample,
    Served,
)
from benchmarks.handoff.shapes import SHAPES
from benchmarks.measured import measured_now

SECTION = "handoff"
KEPT = page.KEPT / "handoff.json"
_RESULTS = page.RESULTS / "handoff.json"
_MODULE = "benchmarks.handoff.run"
POOL_GIB = 2.0
"""Of each side: 16k tokens of an 8B."""

Contender = Callable[[Load], Awaitable[Moved]]


def known_transports() -> list[str]:
    """Of a host's memory, by the names that the configuration has for them; ``benchmarks.gpu``
    measures what is between GPUs."""
    names = get_args(KvTransferConfig.model_fields["transport"].annotation)
    return [name for name in names if name not in ("auto", "cuda_ipc")]


def _contenders(side: DecodeSide) -> dict[str, Contender]:
    async def memcpy(load: Load) -> Moved:
        return side.memcpy(load)

    async def bare_gloo(load: Load) -> Moved:
        return side.gloo(load, contiguous=False)

    async def contiguous(load: Load) -> Moved:
        return side.gloo(load, contiguous=True)

    async def bare_nixl(load: Load) -> Moved:
        return side.nixl(load)

    def over(transport: str) -> Contender:
        return lambda load: side.hand_off(transport, load)

    bounds = {MEMCPY: memcpy, BARE_GLOO: bare_gloo, CONTIGUOUS: contiguous}
    if "nixl" in side.transports:
        bounds[BARE_NIXL] = bare_nixl
    return {**bounds, **{transport: over(transport) for transport in side.transports}}


async def _measure(
    side: DecodeSide, loads: Sequence[Load], transports: Sequence[str], rounds: int
) -> list[tuple[Load, str, Moved]]:
    """A first round of every load is not counted: it connects, and touches what is touched."""
    for transport in transports:
        await side.add(transport)
    contenders = list(_contenders(side).items())
    found: list[tuple[Load, str, Moved]] = []
    try:
        for load in loads:
            for number in range(-1, rounds):
                turned = (
                    contenders[number % len(contenders) :] + contenders[: number % len(contenders)]
                )
                for name, contender in turned:
                    moved = await contender(load)
                    if number >= 0:
                        found.append((load, name, moved))
    finally:
        await side.close()
    return found


def measure(
    shape: str,
    *,
    pool_bytes: int,
    tokens: Sequence[int],
    transports: Sequence[str],
    rounds: int,
) -> tuple[list[Sample], dict[str, str]]:
    """One shape, in this process and one that it starts; and what could not be measured."""
    layout = SHAPES[shape].layout_within(pool_bytes)
    loads = [load_in(layout, each, requests) for each in tokens for requests in REQUESTS]
    with DecodeSide.open(layout) as side:
        found = asyncio.run(_measure(side, loads, transports, rounds))
        samples = [
            Sample(
                shape=shape,
                tokens=load.tokens,
                requests=load.requests,
                at_once=load.at_once,
                contender=name,
                num_bytes=moved.num_bytes,
                moved_s=round(moved.moved_s, 6),
                whole_s=round(moved.whole_s, 6),
                ready_ms=round(moved.ready_ms, 3),
            )
            for load, name, moved in found
        ]
        return samples, side.absent


def _measured_apart(shape: str, given: argparse.Namespace) -> dict[str, Any]:
    """A process each, whose memory goes with it."""
    done = subprocess.run(
        [sys.executable, "-m", _MODULE, "--one", shape, "--rounds", str(given.rounds),
         "--pool-gib", str(given.pool_gib), "--tokens", *map(str, given.tokens),
         "--transports", *given.transports],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _beside(rounds: int) -> tuple[Beside, ...]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.handoff.beside", "--rounds", str(rounds)],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return tuple(Beside(**each) for each in json.loads(done.stdout))


def _served(given: argparse.Namespace, absent: dict[str, str]) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="baton-handoff-") as folder:
        for transport in given.transports:
            if transport not in absent:
                yield from exposed.measure(
                    Path(folder) / transport,
                    transport,
                    tokens=exposed.TOKENS,
                    repeats=given.rounds,
                )


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report.section(Results.read(kept))


def _publish(path: Path) -> None:
    page.publish(Results, path, module=_MODULE, kept=KEPT, name=SECTION, section=section)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="and requests of each length")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--transports", nargs="+", choices=known_transports(), default=known_transports()
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--pool-gib", type=float, default=POOL_GIB, help="of each of two pools")
    parser.add_argument("--skip-engine", action="store_true", help="the two processes alone")
    parser.add_argument("--one", choices=list(SHAPES), help="measure this shape, print JSON")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    return parser


def main() -> None:
    given = _parser().parse_args()
    if given.report:
        _publish(given.out)
        return
    if given.one:
        samples, absent = measure(
            given.one,
            pool_bytes=int(given.pool_gib * 2**30),
            tokens=given.tokens,
            transports=given.transports,
            rounds=given.rounds,
        )
        print(json.dumps({"samples": [asdict(each) for each in samples], "absent": absent}))
        return
    measured = measured_now(shlex.join(["python", "-m", _MODULE, *sys.argv[1:]]))
    apart = [_measured_apart(shape, given) for shape in given.shapes]
    absent = {name: reason for each in apart for name, reason in each["absent"].items()}
    beside = () if given.skip_engine else _beside(given.rounds)
    served = [] if given.skip_engine else list(_served(given, absent))
    results = Results(
        measured=measured,
        rounds=given.rounds,
        pool_bytes=int(given.pool_gib * 2**30),
        samples=tuple(Sample(**sample) for each in apart for sample in each["samples"]),
        served=tuple(served),
        beside=beside,
        absent=absent,
    )
    results.write(given.out)
    print(f"{report.section(Results.read(given.out))}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, httpx.HTTPError, subprocess.CalledProcessError) as error:
        sys.exit(f"handoff: {error}")
