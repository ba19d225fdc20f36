"""What a hand-off adds to an answer: a served prefill and decode worker, asked over HTTP."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.chat_client import new_client, served_model
from benchmarks.handoff.report import Served
from benchmarks.server import BatonServer

TOKENS = (1000, 2000, 4000)
_ANSWER_TOKENS = 24
"""As many gaps as the timeline wants to know the steady one by, and more."""
_VOCABULARY = range(1000, 40_000)
_REST_S = 1.0
_KV_BYTES = 512 * 1024 * 1024


def measure(
    folder: Path, transport: str, *, tokens: Sequence[int], repeats: int
) -> Iterator[Served]:
    """Raises UnavailableError, httpx.HTTPError, or ValueError for an answer without a
    timeline."""
    settings = {
        "engine": {"dtype": "bfloat16", "kv_cache_bytes": _KV_BYTES},
        "kv_transfer": {"transport": transport},
        "routing": {"local_prefill_max_tokens": 0},
    }
    server = BatonServer(folder, settings=settings, arguments=("--prefill", "1", "--decode", "1"))
    with server, new_client(server.url, timeout_s=120.0) as client:
        model, rng = served_model(client).name, random.Random(0)
        for number in tokens:  # what only a server's first requests cost
            _ask(client, model, [rng.choice(_VOCABULARY) for _ in range(number)])
        for _ in range(repeats):
            for number in tokens:
                prompt = [rng.choice(_VOCABULARY) for _ in range(number)]
                before = _handoff_s(server)
                ttft_ms, exposed_ms = _ask(client, model, prompt)
                time.sleep(_REST_S)
                yield Served(
                    transport=transport,
                    tokens=number,
                    ttft_ms=round(ttft_ms, 2),
                    ready_ms=round((_handoff_s(server) - before) * 1000, 3),
                    exposed_ms=round(exposed_ms, 2),
                )


def _handoff_s(server: BatonServer) -> float:
    return server.metric("baton_kv_handoff_seconds_sum")


def _ask(client: httpx.Client, model: str, prompt: Sequence[int]) -> tuple[float, float]:
    """TTFT and the exposed part of the hand-off, in ms."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    ttft_ms: float | None = None
    last: dict[str, Any] = {}
    began = time.monotonic()
    headers = {"X-Baton-Timeline": "1"}
    with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line.removeprefix("data: "))
                if ttft_ms is None and any(c.get("token_ids") for c in last.get("choices", ())):
                    ttft_ms = (time.monotonic() - began) * 1000
    if ttft_ms is None or "baton" not in last:
        raise ValueError(f"the answer has no token or no timeline: {last}")
    exposed_ms = last["baton"]["timeline"][0]["handoff_exposed"]
    if exposed_ms is None:
        raise ValueError("the answer's timeline knows no hand-off")
    return ttft_ms, exposed_ms
