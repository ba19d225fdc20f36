"""How near does a colocated Baton come to what this machine's matrix products allow, and to others?

One after the other, in rounds: the products alone (``benchmarks.engine.bound``), streams that all
decode at once, and long prompts on an idle server, over HTTP. Peers are asked by the same client;
an idle one takes memory alone.

    python -m benchmarks.engine.compare --rounds 3
    python -m benchmarks.engine.compare --peer vllm --peer llamacpp --quantization int4
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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from baton.errors import BatonError
from baton.worker.environment import worker_environment
from benchmarks import page, prompts
from benchmarks.chat_stream import RequestFailed
from benchmarks.engine import report, servers
from benchmarks.engine.bound import Bound
from benchmarks.engine.report import Results, Sample, Server
from benchmarks.engine.servers import Running
from benchmarks.engine.streams import decode_step_ms, stream_all
from benchmarks.measured import measured_now

SECTION = "engine"
KEPT = page.KEPT / "engine.json"
_RESULTS = page.RESULTS / "engine.json"
LOADS = (1, 8, 32)
PROMPT_TOKENS = 1000
"""Of the text; the chat template adds some."""
_CONTEXT_TOKENS = 64
_PROMPTS = 3
"""Long ones, each another, in a round; their median counts."""
_REST_S = 1.0


def bound_now(num_prompt_tokens: int) -> Bound:
    """In a process of its own, with the threads and the environment that one worker has."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.bound", "--rows", *map(str, LOADS),
         "--prompt", str(num_prompt_tokens)],
        check=True, capture_output=True, text=True,
        env={**os.environ, **worker_environment(os.environ)},
    )  # fmt: skip
    return Bound(**json.loads(done.stdout))


def round_of(running: Running, number: int, *, answer_tokens: int) -> Iterator[Sample]:
    """Every load, and the long prompts, once."""
    for load in LOADS:
        bodies = [
            _body(running, _CONTEXT_TOKENS, answer_tokens, number, load, stream)
            for stream in range(load)
        ]
        streams = asyncio.run(stream_all(running.url, bodies))
        yield Sample(
            running.name, load, streams[0].num_prompt_tokens, round(decode_step_ms(streams), 3)
        )
        time.sleep(_REST_S)
    found = []
    for each in range(_PROMPTS):
        body = _body(running, PROMPT_TOKENS, 2, number, "prompt", each)
        found += asyncio.run(stream_all(running.url, [body]))
        time.sleep(_REST_S)
    ttft_ms = statistics.median(stream.ttft_s for stream in found) * 1000
    yield Sample(running.name, 0, found[0].num_prompt_tokens, round(ttft_ms, 3))


def _body(running: Running, num_tokens: int, answer_tokens: int, *name: object) -> dict[str, Any]:
    text = prompts.document(prompts.rng(running.name, *name), num_tokens)
    return {
        "model": running.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def measure(found: Sequence[Running], *, rounds: int, answer_tokens: int) -> Iterator[object]:
    """A Bound and the Samples of each round. A first round of every server is not counted."""
    num_prompt_tokens = PROMPT_TOKENS
    for running in found:
        *_, prompt = round_of(running, -1, answer_tokens=8)
        num_prompt_tokens = prompt.prompt_tokens
    for number in range(rounds):
        yield bound_now(num_prompt_tokens)
        for running in found:
            yield from round_of(running, number, answer_tokens=answer_tokens)


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report.section(Results.read(kept))


def main() -> None:
    module = "benchmarks.engine.compare"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=96, help="of each stream")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    parser.add_argument(
        "--peer", choices=sorted(servers.PEERS), action="append", default=[],
        help="measure it too; benchmarks/peers/setup.sh sets it up",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="measure a Baton with such weights too"
    )
    given = parser.parse_args()
    if given.report:
        page.publish(Results, given.out, module=module, kept=KEPT, name=SECTION, section=section)
        return
    measured = measured_now(shlex.join(["python", "-m", module, *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="baton-engine-") as name, ExitStack() as stack:
        folder = Path(name)
        starting: list[AbstractContextManager[Running]] = [servers.baton(folder / "baton")]
        if given.quantization:
            starting.append(servers.baton(folder / "few", quantization=given.quantization))
        starting += [servers.PEERS[peer](folder / peer) for peer in given.peer]
        found = [stack.enter_context(each) for each in starting]
        taken = list(measure(found, rounds=given.rounds, answer_tokens=given.answer_tokens))
        described = tuple(
            Server(each.name, round(each.start_s, 2), round(each.pss_bytes() / 1e6, 1))
            for each in found
        )
    results = Results(
        measured=measured,
        context_tokens=_CONTEXT_TOKENS,
        answer_tokens=given.answer_tokens,
        bounds=tuple(each for each in taken if isinstance(each, Bound)),
        servers=described,
        samples=tuple(each for each in taken if isinstance(each, Sample)),
    )
    results.write(given.out)
    print(f"{report.section(Results.read(given.out))}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, RequestFailed) as error:
        sys.exit(f"engine: {error}")
