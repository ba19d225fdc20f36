"""Greedy streams whose texts are known: each follows one choice and times its chunks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from support.server import BatonServer, wait_until


@dataclass(slots=True)
class Stream:
    """One streamed completion, as its client sees it."""

    prompt: str
    token_ids: list[int] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)
    """Of each chunk with tokens, seconds."""
    finish_reason: str | None = None
    error: str | None = None
    is_done: bool = False
    asked_at: float = 0.0
    """Seconds, by the clock of ``arrived_at``."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Of its timeline; known at its end."""

    @property
    def longest_gap_s(self) -> float:
        """Between two chunks with tokens."""
        pairs = zip(self.arrived_at, self.arrived_at[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)

    def follow(self, url: str, *, model: str, max_tokens: int, cache_salt: str = "") -> None:
        """Runs to the stream's end, or to its error, which is kept."""
        body = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": cache_salt,
        }
        headers = {"X-Baton-Timeline": "1"}
        self.asked_at = time.monotonic()
        with (
            httpx.Client(timeout=180.0, trust_env=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                self.error = answer.read().decode()
                return
            for line in answer.iter_lines():
                self._take(line)

    def _take(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.is_done = True
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            self.error = str(chunk["error"])
            return
        if "baton" in chunk:
            (timeline,) = chunk["baton"]["timeline"]
            self.attempts = timeline["attempts"]
        for choice in chunk["choices"]:
            if choice.get("token_ids"):
                self.token_ids += choice["token_ids"]
                self.arrived_at.append(time.monotonic())
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


class Streams:
    """Streams that run at the same time."""

    def __init__(self, streams: Sequence[Stream], futures: Sequence[Future[None]]) -> None:
        self.each = list(streams)
        self._futures = list(futures)

    def wait_all_flow(self, num_tokens: int) -> None:
        """Until every stream has so many tokens."""
        wait_until(
            lambda: all(len(s.token_ids) >= num_tokens for s in self.each) or self.any_ended,
            timeout_s=90,
            what=f"{num_tokens} tokens on every stream",
        )

    @property
    def any_ended(self) -> bool:
        return any(future.done() for future in self._futures)

    @property
    def all_ended(self) -> bool:
        return all(future.done() for future in self._futures)

    def results(self) -> list[list[int]]:
        """Every stream's tokens; AssertionError for one that did not end well."""
        for future in self._futures:
            future.result(180)
        for stream in self.each:
            assert stream.error is None, stream.error
            assert stream.is_done
            assert stream.finish_reason == "length"
        return [stream.token_ids for stream in self.each]

    @property
    def longest_gap_s(self) -> float:
        return max(stream.longest_gap_s for stream in self.each)

    @property
    def longest_ttft_s(self) -> float:
        """Of those that have a token."""
        return max(s.arrived_at[0] - s.asked_at for s in self.each if s.arrived_at)


@contextmanager
def streaming(
    server: BatonServer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    cache_salt: str = "",
    url: str | None = None,
) -> Iterator[Streams]:
    """One stream for each prompt, all at once; leaves the block when all have ended.
    With a ``cache_salt`` of its own nothing of it is cached."""
    model = server.model()
    streams = [Stream(prompt) for prompt in prompts]
    barrier = threading.Barrier(len(streams))

    def run(stream: Stream) -> None:
        barrier.wait(30)
        where = url or server.url
        stream.follow(where, model=model, max_tokens=max_tokens, cache_salt=cache_salt)

    with ThreadPoolExecutor(len(streams)) as threads:
        yield Streams(streams, [threads.submit(run, stream) for stream in streams])
