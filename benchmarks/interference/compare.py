"""What do long prompts do to streams that decode beside them? Disaggregated, colocated, and vLLM.

In rounds, each system is started afresh on the same two cores, warmed up, and given the round's
load: tokens/s of some streams alone, then streams that decode while long prompts arrive.

    bash benchmarks/peers/setup.sh vllm                   # once
    python -m benchmarks.interference.compare             # some 25 minutes
    python -m benchmarks.interference.compare --no-peers  # Baton alone, some 9
    python -m benchmarks.interference.compare --report    # results into docs/, runs nothing
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from baton.errors import BatonError, ConfigurationError
from benchmarks import page
from benchmarks.chat_stream import RequestFailed
from benchmarks.engine import servers
from benchmarks.interference import plot, report
from benchmarks.interference.client import Client, Load, Observed
from benchmarks.interference.pinning import this_thread_on
from benchmarks.interference.results import Results, Round, Setting, Tried, round_of
from benchmarks.interference.systems import (
    COLOCATED,
    DISAGGREGATED,
    VLLM,
    VLLM_DISAGGREGATED,
    VLLM_SMALL,
    System,
    serving,
    two_cores,
)
from benchmarks.measured import Measured, measured_now

SECTION = "interference"
KEPT, PLOT = page.KEPT / "interference.json", page.KEPT / "interference.svg"
_RESULTS = page.RESULTS / "interference.json"
_MODULE = "benchmarks.interference.compare"
_SWEEP_PROMPTS = 5
"""Of the shorter load under which a chunk size is tried."""


def systems(chunk: int, small_steps: int, *, peers: bool) -> tuple[System, ...]:
    own = (
        System(DISAGGREGATED, "baton", True),
        System(COLOCATED, "baton", False, max_num_batched_tokens=chunk),
    )
    others = (
        System(VLLM, "vllm", False),
        System(VLLM_SMALL, "vllm", False, max_num_batched_tokens=small_steps),
        System(VLLM_DISAGGREGATED, "vllm", True),
    )
    return (*own, *others) if peers else own


class Experiment:
    """One after the other on the same cores. ``folder`` is for what servers write."""

    def __init__(self, load: Load, seed: int, folder: Path) -> None:
        self._load = load
        self._seed = seed
        self._folder = folder
        self._cores = two_cores()
        self.prompt_tokens = 0
        """The most that a server has counted of a long prompt."""

    def sweep(self, chunks: Sequence[int]) -> Iterator[Tried]:
        """Colocated Baton with each chunk size, under a shorter load."""
        load = replace(self._load, num_prompts=_SWEEP_PROMPTS)
        for chunk in chunks:
            system = System(COLOCATED, "baton", False, max_num_batched_tokens=chunk)
            found = self._measure(system, 0, load, f"{self._seed}/sweep")
            yield Tried(chunk, found.itl(50), found.itl(99), found.ttft(90))

    def round(self, number: int, compared: Sequence[System]) -> Iterator[Round]:
        """Every system once; who is first turns from round to round."""
        turn = number % len(compared)
        for system in (*compared[turn:], *compared[:turn]):
            yield self._measure(system, number, self._load, f"{self._seed}/{number}")

    def _measure(self, system: System, number: int, load: Load, seed: str) -> Round:
        began = time.monotonic()
        folder = self._folder / f"{seed}-{system.name}-{system.max_num_batched_tokens}"
        with serving(system, folder, self._cores) as found:
            client = Client(found.running.url, found.running.model, load, seed)
            with this_thread_on(system.client_cores(self._cores)):
                step_ms, observed = asyncio.run(_drive(client))
            setting = Setting(system.name, number, step_ms, found.start_s, found.pss_mb())
        counted = (prompt.num_prompt_tokens or 0 for prompt in observed.prompts)
        self.prompt_tokens = max(self.prompt_tokens, *counted)
        measured = round_of(setting, observed, bound_s=load.bound_s)
        print(
            f"{system.name} {system.max_num_batched_tokens or ''}: ITL p50 {measured.itl(50):.1f}, "
            f"p99 {measured.itl(99):.1f}, longest {measured.itl(100):.1f} ms; TTFT p90 "
            f"{measured.ttft(90):.2f} s; step at {load.num_saturating} {step_ms:.1f} ms; in "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        return measured


async def _drive(client: Client) -> tuple[float, Observed]:
    await client.warm_up()
    return await client.step_ms(), await client.interfere()


def best(tried: Sequence[Tried]) -> int:
    """The chunk size with the lowest ITL p99 of those whose prompts are in time, or the lowest
    TTFT p90 where none are."""
    in_time = [each for each in tried if each.ttft_p90_s <= report.TTFT_P90_GOAL_S]
    if in_time:
        return min(in_time, key=lambda each: each.itl_p99_ms).max_num_batched_tokens
    return min(tried, key=lambda each: each.ttft_p90_s).max_num_batched_tokens


def run(given: argparse.Namespace, load: Load, measured: Measured, folder: Path) -> Results:
    """Raises BatonError, RequestFailed, OSError, ValueError."""
    os.sched_setaffinity(0, two_cores())  # all that is started inherits it
    experiment = Experiment(load, given.seed, folder)
    tried = tuple(experiment.sweep(given.chunks)) if len(given.chunks) > 1 else ()
    chunk = best(tried) if tried else given.chunks[0]
    compared = systems(chunk, given.small_steps, peers=given.peers)
    rounds = [each for number in range(given.rounds) for each in experiment.round(number, compared)]
    phase = load.phase(f"{given.seed}/0")
    return Results(
        measured=measured,
        load=load,
        prompt_tokens=experiment.prompt_tokens,
        arrivals_s=tuple(round(arrival.at_s, 3) for arrival in phase.arrivals),
        num_rounds=given.rounds,
        vllm_version=servers.version("vllm") if given.peers else "",
        tried=tried,
        systems=compared,
        rounds=tuple(rounds),
    )


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report.section(Results.read(kept), PLOT.relative_to(page.PAGE.parent).as_posix())


def _publish(path: Path) -> None:
    page.publish(Results, path, module=_MODULE, kept=KEPT, name=SECTION, section=section)
    plot.draw(Results.read(KEPT), PLOT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--report", action="store_true", help="write docs/performance.md from the results kept")
    add("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the results")
    add("--rounds", type=int, default=3, metavar="N", help="figures are medians over them")
    add("--no-peers", dest="peers", action="store_false", help="Baton alone")
    add(
        "--chunks", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N",
        help="of colocated Baton; of several, the best is found first",
    )  # fmt: skip
    add("--small-steps", type=int, default=128, metavar="N", help="of vLLM")
    add("--prompts", type=int, default=10, metavar="N", help="long ones, in a round")
    add("--rate", type=float, default=0.25, metavar="R", help="at which they come, 1/s")
    add("--streams", type=int, default=4, metavar="N")
    add("--seed", type=int, default=0, metavar="N")
    return parser


def _load(given: argparse.Namespace) -> Load:
    """Raises ConfigurationError for numbers that make no sense."""
    for name in ("rounds", "prompts", "rate", "streams"):
        if getattr(given, name) <= 0:
            raise ConfigurationError(f"--{name} must be over 0")
    return Load(
        num_streams=given.streams,
        stream_tokens=1000,
        rate_per_s=given.rate,
        num_prompts=given.prompts,
        prompt_tokens=1500,
        answer_tokens=16,
        bound_s=60.0,
        num_saturating=8,
        saturating_tokens=128,
    )


def main() -> None:
    given = _parser().parse_args()
    if given.report:
        _publish(given.out)
        return
    load = _load(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # vLLM's processes outlive a parent
    measured = measured_now(shlex.join(["python", "-m", _MODULE, *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="baton-interference-") as name:
        results = run(given, load, measured, Path(name))
    results.write(given.out)
    picture = given.out.with_suffix(".svg")
    plot.draw(results, picture)
    print(f"{report.section(results, picture.name)}\n\nwritten: {given.out}, {picture}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, LookupError, RequestFailed) as error:
        sys.exit(f"interference: {error}")
