"""What is a repeated prompt's time to the first token, beside that of its first time?

Different prompts of 1,000 tokens are each asked several times, one request after the other, of
two servers: one prefill and one decode worker, and one worker that does both, with the default
settings. The first time nothing of a prompt is cached, later all of its full blocks are. Printed
are the medians, their ratio, and where the repeated time goes.

    python -m benchmarks.prefix_cache --prompts 8 --repeats 5
    python -m benchmarks.prefix_cache --report     # results into docs/, runs nothing

The servers take turns; the one that is not measured has nothing to do.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from baton.errors import BatonError
from benchmarks import page, prefix_cache_report
from benchmarks.chat_client import new_client, served_model
from benchmarks.chat_stream import RequestFailed
from benchmarks.measured import measured_now
from benchmarks.prefix_cache_report import APART, COLOCATED, PARTS, Results, Sample
from benchmarks.server import BatonServer

SECTION = "prefix cache"
KEPT = page.KEPT / "prefix-cache.json"
_RESULTS = page.RESULTS / "prefix-cache.json"
NUM_PREFILL = {APART: "1", COLOCATED: "0"}
"""Prefill workers of each way, beside one decode worker."""
NUM_TOKENS = 1000
_ANSWER_TOKENS = 4
_VOCABULARY = range(1000, 40_000)
_REST_S = 1.0
"""Until the gateway has heard what the workers hold, and they have nothing to do."""


class Probe:
    """Measures single requests on one server."""

    def __init__(self, way: str, client: httpx.Client, seed: int) -> None:
        self._way = way
        self._client = client
        self._model = served_model(client).name
        self._rng = random.Random(seed)

    def warm_up(self) -> None:
        """What only a server's first requests cost: a prompt that is asked no more, twice."""
        for _ in self.measure(-1, num_repeats=1):
            pass

    def measure(self, number: int, *, num_repeats: int) -> Iterator[Sample]:
        """A prompt of its own, its first time and its repetitions."""
        prompt = self._rng.sample(_VOCABULARY, NUM_TOKENS)
        for repeat in range(1 + num_repeats):
            yield self._ask(prompt, number, repeat)
            time.sleep(_REST_S)

    def _ask(self, prompt: list[int], number: int, repeat: int) -> Sample:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": _ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        ttft_ms: float | None = None
        last: dict[str, Any] = {}
        began = time.monotonic()
        for chunk in _events(self._client, body):
            if ttft_ms is None and any(choice.get("token_ids") for choice in chunk["choices"]):
                ttft_ms = (time.monotonic() - began) * 1000
            last = chunk
        if ttft_ms is None or not last.get("usage"):
            raise ValueError("the server's answer has no token, or no usage")
        (timeline,) = last["baton"]["timeline"]
        used = last["usage"]
        return Sample(
            way=self._way,
            prompt=number,
            repeat=repeat,
            num_tokens=used["prompt_tokens"],
            num_cached_tokens=(used["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            prefill_worker=timeline["attempts"][-1]["prefill"],
            ttft_ms=round(ttft_ms, 2),
            parts_ms={part: timeline[part] or 0.0 for part in PARTS},
        )


def _events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of one streamed answer."""
    headers = {"X-Baton-Timeline": "1"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(f"the server gave a request up: {chunk['error']}")
                yield chunk


def measure(urls: dict[str, str], *, num_prompts: int, num_repeats: int) -> list[Sample]:
    """Every prompt on every server, prompt by prompt, so that the ways share what the machine
    does meanwhile."""
    samples: list[Sample] = []
    with ExitStack() as stack:
        probes = [
            Probe(way, stack.enter_context(new_client(url, timeout_s=120.0)), seed)
            for seed, (way, url) in enumerate(urls.items())
        ]
        for probe in probes:
            probe.warm_up()
        for number in range(num_prompts):
            for probe in probes:
                samples += probe.measure(number, num_repeats=num_repeats)
    return samples


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return prefix_cache_report.section(Results.read(kept))


def _publish(path: Path) -> None:
    module = "benchmarks.prefix_cache"
    page.publish(Results, path, module=module, kept=KEPT, name=SECTION, section=section)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_cache", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--prompts", type=int, default=8, help="different ones, on each server")
    parser.add_argument("--repeats", type=int, default=5, help="of each, after its first time")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    given = parser.parse_args()
    if given.report:
        _publish(given.out)
        return
    measured = measured_now(shlex.join(["python", "-m", "benchmarks.prefix_cache", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="baton-prefix-cache-") as name, ExitStack() as stack:
        urls: dict[str, str] = {}
        for way, num_prefill in NUM_PREFILL.items():
            server = BatonServer(
                Path(name) / way,
                settings={"engine": {"dtype": given.dtype}},
                arguments=("--prefill", num_prefill, "--decode", "1"),
            )
            urls[way] = stack.enter_context(server).url
        samples = measure(urls, num_prompts=given.prompts, num_repeats=given.repeats)
    results = Results(measured, given.dtype, given.prompts, given.repeats, tuple(samples))
    results.write(given.out)
    print(f"{prefix_cache_report.section(results)}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, httpx.HTTPError, RequestFailed) as error:
        sys.exit(f"prefix_cache: {error}")
