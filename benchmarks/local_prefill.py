"""From how many uncached tokens on is it worth asking a prefill worker?

One prefill and one decode worker serve the next turn of a conversation that they hold, so that
only its last ``16 … 1024`` tokens are to be computed: once disaggregated, once by the decode
worker alone; on an idle server and beside streams that decode. Printed are the times to the
first and to the second token (the second waits for the hand-off), what the other streams'
token gaps grew to meanwhile, and at which lengths local prefill is slower.

    python -m benchmarks.local_prefill --dtype float32
    python -m benchmarks.local_prefill --report     # results into docs/, runs nothing

There is one server for each way, of one prefill and one decode worker, and they take turns;
the one that is not measured has nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from baton.errors import BatonError
from benchmarks import local_prefill_report, page
from benchmarks.local_prefill_report import APART, LOCAL, Results, Sample
from benchmarks.measured import measured_now
from benchmarks.server import BatonServer

SECTION = "local prefill"
KEPT = page.KEPT / "local-prefill.json"
_RESULTS = page.RESULTS / "local-prefill.json"
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
WAYS: dict[str, dict[str, Any]] = {
    APART: {"local_prefill_max_tokens": 0},
    # With a hand-off this dear, no pair is ever chosen.
    LOCAL: {"local_prefill_max_tokens": 1 << 20, "transfer_weight": 1e9},
}
"""The settings of ``routing`` that leave no other choice."""
_PREFIX_TOKENS = 256
"""Held before each measurement by the workers that share the work."""
_ANSWER_TOKENS = 16
"""Of those, the last ones: the decode worker's own. A block."""
_VOCABULARY = range(1000, 40_000)
_WARM_UP_S = 3.0


class Background:
    """Endless streams, and when their tokens came."""

    def __init__(self, client: httpx.AsyncClient, model: str, rng: random.Random) -> None:
        self._client = client
        self._model = model
        self._rng = rng
        self._arrivals: dict[int, list[float]] = {}

    @asynccontextmanager
    async def streaming(self, num_streams: int) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._stream(number)) for number in range(num_streams)]
        try:
            if tasks:
                await asyncio.sleep(_WARM_UP_S)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._arrivals.clear()

    async def _stream(self, number: int) -> None:
        times = self._arrivals.setdefault(number, [])
        while True:
            prompt = self._rng.sample(_VOCABULARY, 32)
            async for _ in tokens(self._client, self._model, prompt, 512):
                times.append(time.monotonic())

    def worst_gap_ms(self, since: float, until: float) -> float:
        """The longest pause of any stream that touches that time."""
        gaps = [0.0]
        for times in self._arrivals.values():
            for before, after in pairwise(times):
                if before < until and after > since:
                    gaps.append((after - before) * 1000)
        return max(gaps)


async def tokens(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], max_tokens: int
) -> AsyncIterator[int]:
    """Token ids as they come."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(f"the server gave a request up: {chunk['error']}")
                for choice in chunk["choices"]:
                    for token_id in choice.get("token_ids") or []:
                        yield token_id


@dataclass(slots=True)
class Answer:
    """Tokens, and when each came."""

    began: float
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Probe:
    """Measures single requests on one server."""

    def __init__(self, way: str, client: httpx.AsyncClient, model: str, seed: int) -> None:
        self._way = way
        self._client = client
        self._model = model
        self._rng = random.Random(seed)
        self._prefix: list[int] = []
        self.background = Background(client, model, self._rng)

    async def hold_prefix(self) -> None:
        """Makes the decode worker hold the prefix, as a conversation whose last turn it
        answered; apart, the prefill worker is asked about that turn too."""
        question = self._rng.sample(_VOCABULARY, _PREFIX_TOKENS - _ANSWER_TOKENS)
        answer = await self._ask(question, _ANSWER_TOKENS + 1)  # the last one's KV is not filled
        self._prefix = [*question, *answer.token_ids[:_ANSWER_TOKENS]]
        await asyncio.sleep(1.0)  # until the gateway has heard of it
        if self._way == APART:
            await self._ask([*self._prefix, 7])
            await asyncio.sleep(1.0)

    async def measure(self, num_uncached: int, num_streams: int) -> Sample:
        new = self._rng.sample(_VOCABULARY, num_uncached)
        answer = await self._ask([*self._prefix, *new])
        began, (first, second, *_) = answer.began, answer.times
        # A gap ends with the token after it: give the streams time to get theirs.
        await asyncio.sleep(0.5)
        return Sample(
            way=self._way,
            num_streams=num_streams,
            num_uncached=num_uncached,
            ttft_ms=round((first - began) * 1000, 2),
            second_ms=round((second - began) * 1000, 2),
            worst_gap_ms=round(self.background.worst_gap_ms(began, second), 2),
        )

    async def _ask(self, prompt: Sequence[int], num_tokens: int = 4) -> Answer:
        answer = Answer(time.monotonic())
        async for token_id in tokens(self._client, self._model, prompt, num_tokens):
            answer.times.append(time.monotonic())
            answer.token_ids.append(token_id)
        return answer


async def measure(urls: dict[str, str], *, repeats: int, busy: int) -> list[Sample]:
    """All lengths, idle and busy, on the servers of both ways in turn."""
    samples: list[Sample] = []
    async with AsyncClients(urls) as clients:
        probes = {way: Probe(way, *clients[way], seed=n) for n, way in enumerate(urls)}
        for num_streams in (0, busy):
            for probe in probes.values():  # one after the other: they share the machine
                await probe.hold_prefix()
                async with probe.background.streaming(num_streams):
                    for length in LENGTHS:
                        for _ in range(repeats):
                            samples.append(await probe.measure(length, num_streams))
    return samples


class AsyncClients:
    """A client and the model's name for each server."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self._clients: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> dict[str, tuple[httpx.AsyncClient, str]]:
        found: dict[str, tuple[httpx.AsyncClient, str]] = {}
        for way, url in self._urls.items():
            client = httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False)
            self._clients.append(client)
            models = (await client.get("/v1/models")).json()["data"]
            found[way] = (client, models[0]["id"])
        return found

    async def __aexit__(self, *raised: object) -> None:
        for client in self._clients:
            await client.aclose()


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return local_prefill_report.section(Results.read(kept))


def _publish(path: Path) -> None:
    module = "benchmarks.local_prefill"
    page.publish(Results, path, module=module, kept=KEPT, name=SECTION, section=section)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.local_prefill", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--repeats", type=int, default=7, help="of every measurement")
    parser.add_argument("--streams", type=int, default=8, help="on the busy server")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    given = parser.parse_args()
    if given.report:
        _publish(given.out)
        return
    command = ["python", "-m", "benchmarks.local_prefill", *sys.argv[1:]]
    measured = measured_now(shlex.join(command))
    with tempfile.TemporaryDirectory(prefix="baton-local-prefill-") as name, ExitStack() as stack:
        urls: dict[str, str] = {}
        for way, routing in WAYS.items():
            settings = {"engine": {"dtype": given.dtype}, "routing": routing}
            server = BatonServer(Path(name) / way, settings=settings)
            urls[way] = stack.enter_context(server).url
        samples = asyncio.run(measure(urls, repeats=given.repeats, busy=given.streams))
    results = Results(measured, given.dtype, given.repeats, _PREFIX_TOKENS, tuple(samples))
    results.write(given.out)
    print(f"{local_prefill_report.section(results)}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError) as error:
        sys.exit(f"local_prefill: {error}")
