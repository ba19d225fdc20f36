"""How near does a colocated Baton come to what this machine's matrix products allow, and to others?

A round is: the products alone (``benchmarks.engine.bound``), what a step costs besides the model
(``benchmarks.engine.outside``), and then one server after the other, each started afresh and
alone: streams that all decode at once, and long prompts on an idle server, over HTTP. Peers are
asked the same by the same client. Rounds turn the order of the servers.

    python -m benchmarks.engine.compare --rounds 3
    python -m benchmarks.engine.compare --peer vllm --peer llamacpp
    python -m benchmarks.engine.compare --report     # results into docs/, runs nothing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from baton.errors import BatonError
from baton.worker.environment import worker_environment
from benchmarks import page, prompts
from benchmarks.chat_stream import RequestFailed
from benchmarks.engine import report, servers
from benchmarks.engine.results import Bound, Outside, Results, Sample, Server
from benchmarks.engine.servers import Running, Starter
from benchmarks.engine.streams import decode_step_ms, stream_all
from benchmarks.measured import Measured, measured_now

SECTION = "engine"
_MODULE = "benchmarks.engine.compare"
KEPT = page.KEPT / "engine.json"
_RESULTS = page.RESULTS / "engine.json"
LOADS = (1, 8, 32)
PROMPT_TOKENS = 1000
"""Of the text; the chat template adds some."""
_CONTEXT_TOKENS = 64
_PROMPTS = 3
"""Long ones, each another, in a round; their median counts."""
_REST_S = 1.0
_WARM_UP_TOKENS = 8
_BITS = {"llamacpp": "int4"}
"""The weights of the Baton that a peer is measured by, where they are not whole."""


def bound_now(num_prompt_tokens: int) -> Bound:
    """What the products take."""
    rows = map(str, LOADS)
    found = _apart("bound", "--rows", *rows, "--prompt", str(num_prompt_tokens))
    return Bound(**found)


def outside_now() -> list[Outside]:
    """What the most streams' step costs besides the model."""
    return [Outside(**each) for each in _apart("outside", "--rows", str(max(LOADS)))]


def _apart(module: str, *arguments: str) -> Any:
    """What a benchmark prints, in a process with the environment and threads of a worker."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.engine.{module}", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **worker_environment(os.environ)},
    )
    return json.loads(done.stdout)


def round_of(running: Running, number: int, *, answer_tokens: int) -> Iterator[Sample]:
    """Every load, and the long prompts, once."""
    for load in LOADS:
        bodies = [
            _body(running.model, _CONTEXT_TOKENS, answer_tokens, number, load, stream)
            for stream in range(load)
        ]
        streams = asyncio.run(stream_all(running.url, bodies))
        yield Sample(
            running.name, load, streams[0].num_prompt_tokens, round(decode_step_ms(streams), 3)
        )
        time.sleep(_REST_S)
    found = []
    for each in range(_PROMPTS):
        body = _body(running.model, PROMPT_TOKENS, 2, number, "prompt", each)
        found += asyncio.run(stream_all(running.url, [body]))
        time.sleep(_REST_S)
    ttft_ms = statistics.median(stream.ttft_s for stream in found) * 1000
    yield Sample(running.name, 0, found[0].num_prompt_tokens, round(ttft_ms, 3))


def _body(model: str, num_tokens: int, answer_tokens: int, *name: object) -> dict[str, Any]:
    """The same for every server, and another prompt for every other ``name``."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompts.document(prompts.rng(*name), num_tokens)}],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def measure_one(
    start: Starter, folder: Path, number: int, *, answer_tokens: int
) -> Iterator[Sample | Server]:
    """A round of one server, which nothing else runs beside: its Samples, then what it took."""
    with start(folder) as running:
        for _ in round_of(running, -1, answer_tokens=_WARM_UP_TOKENS):
            pass
        yield from round_of(running, number, answer_tokens=answer_tokens)
        yield Server(
            running.name,
            round(running.start_s, 2),
            round(running.pss_bytes() / 1e6, 1),
            running.version,
        )


def measure(
    wanted: Mapping[str, Starter], folder: Path, *, rounds: int, answer_tokens: int
) -> Iterator[Bound | Outside | Server | Sample]:
    """Of each round. A first start of every server is not counted: it fills the caches in which
    servers keep what they have compiled or converted."""
    prompt_tokens = PROMPT_TOKENS
    for name, start in wanted.items():
        with start(folder / f"{name}-first") as running:
            *_, prompt = round_of(running, -1, answer_tokens=_WARM_UP_TOKENS)
            prompt_tokens = prompt.prompt_tokens
            print(f"{name} starts in {running.start_s:.1f} s the first time", file=sys.stderr)
    for number in range(rounds):
        yield bound_now(prompt_tokens)
        yield from outside_now()
        for name in _turned(list(wanted), number):
            own = folder / f"{name}-{number}"
            yield from measure_one(wanted[name], own, number, answer_tokens=answer_tokens)
            print(f"round {number + 1} of {rounds}: {name} is done", file=sys.stderr)


def _turned(names: Sequence[str], number: int) -> list[str]:
    first = number % len(names)
    return [*names[first:], *names[:first]]


def wanted_servers(peers: Sequence[str], bits: str | None) -> dict[str, Starter]:
    """Baton, those with weights in fewer bits, and the peers, by name. Raises ConfigurationError
    for a peer that is not set up, before anything is started."""
    kinds = [*([bits] if bits else []), *(_BITS[peer] for peer in peers if peer in _BITS)]
    for peer in peers:
        servers.program(peer, servers.PROGRAMS[peer])
    return {
        report.BATON: servers.baton,
        **{f"{report.BATON} {kind}": partial(servers.baton, quantization=kind) for kind in kinds},
        **{peer: servers.PEERS[peer] for peer in peers},
    }


def results_of(
    taken: Sequence[Bound | Outside | Server | Sample], measured: Measured, *, answer_tokens: int
) -> Results:
    return Results(
        measured=measured,
        context_tokens=_CONTEXT_TOKENS,
        answer_tokens=answer_tokens,
        bounds=tuple(each for each in taken if isinstance(each, Bound)),
        servers=tuple(each for each in taken if isinstance(each, Server)),
        samples=tuple(each for each in taken if isinstance(each, Sample)),
        outsides=tuple(each for each in taken if isinstance(each, Outside)),
        kv_tokens=servers.kv_tokens(),
    )


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report.section(Results.read(kept))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    parser.add_argument(
        "--peer", choices=sorted(servers.PEERS), action="append", default=[],
        help="measure it too, llamacpp beside a Baton with int4 weights; "
        "benchmarks/peers/setup.sh sets it up",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="measure a Baton with such weights too"
    )
    return parser.parse_args(given)


def main() -> None:
    given = arguments()
    if given.report:
        page.publish(Results, given.out, module=_MODULE, kept=KEPT, name=SECTION, section=section)
        return
    wanted = wanted_servers(given.peer, given.quantization)
    measured = measured_now(shlex.join(["python", "-m", _MODULE, *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="baton-engine-") as name:
        taken = list(
            measure(wanted, Path(name), rounds=given.rounds, answer_tokens=given.answer_tokens)
        )
    results_of(taken, measured, answer_tokens=given.answer_tokens).write(given.out)
    print(f"{section(given.out)}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, RequestFailed) as error:
        sys.exit(f"engine: {error}")
