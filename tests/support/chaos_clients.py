"""Clients that ask all at once, stay or leave, and what each of them was told."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from support.handoff_schedule import Ask

ANSWER_S = 40.0
"""A request that takes longer hangs."""


@dataclass(slots=True)
class Answer:
    """What came of an ask."""

    ask: Ask
    token_ids: list[int] = field(default_factory=list)
    arrived_at: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    has_left: bool = False
    took_s: float = 0.0

    @property
    def longest_gap_s(self) -> float:
        """Before the first token, or between two; of an answer in one piece its whole time."""
        if not self.ask.stream:
            return 0.0 if self.has_left else self.took_s
        moments = self.arrived_at
        return max((b - a for a, b in itertools.pairwise(moments)), default=0.0)

    def fault(self, expected: Sequence[int]) -> str | None:
        """What is wrong with it, in words; None where it is as it must be."""
        said = self.token_ids
        if self.error is not None:
            return f"failed: {self.error}"
        if self.has_left:
            return None if said == list(expected[: len(said)]) else f"{said} begins not {expected}"
        if said != list(expected):
            return f"answered {said}, not {expected}"
        return None if self.finish_reason == "length" else f"ended by {self.finish_reason}"


def _follow(url: str, model: str, salt: str, answer: Answer) -> None:
    ask, began = answer.ask, time.monotonic()
    answer.arrived_at.append(began)
    body = {
        "model": model,
        "prompt": list(ask.question.prompt),
        "max_tokens": ask.question.max_tokens,
        "temperature": ask.question.temperature,
        "seed": ask.question.seed,
        "ignore_eos": True,
        "stream": ask.stream,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    whole_leaves = ask.leaves and not ask.stream
    timeout_s = ask.leaves_after if whole_leaves else ANSWER_S
    try:
        with (
            httpx.Client(timeout=timeout_s, trust_env=False, verify=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                answer.error = f"{response.status_code} {response.read().decode()}"
            elif ask.stream:
                _read(response.iter_lines(), answer)
            else:
                _take(answer, json.loads(response.read()))
    except httpx.TimeoutException as error:
        answer.has_left = whole_leaves
        answer.error = None if whole_leaves else f"hangs: {error!r}"
    except httpx.HTTPError as error:
        answer.error = f"was cut off: {error!r}"
    answer.took_s = time.monotonic() - began


def _read(lines: Iterator[str], answer: Answer) -> None:
    """To the end of the stream, or to where the client leaves."""
    ask, ends_at = answer.ask, time.monotonic() + ANSWER_S
    if ask.leaves and ask.leaves_after == 0:
        answer.has_left = True
        return
    for line in lines:
        if time.monotonic() > ends_at:  # comments keep a stream alive that says nothing
            answer.error = f"hangs after {len(answer.token_ids)} tokens"
            return
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            _take(answer, json.loads(line.removeprefix("data: ")))
        if ask.leaves and len(answer.token_ids) >= ask.leaves_after:
            answer.has_left = True
            return
    answer.error = answer.error or "ended without [DONE]"


def _take(answer: Answer, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        answer.error = str(chunk["error"])
        return
    for choice in chunk["choices"]:
        if choice.get("token_ids"):
            answer.token_ids += choice["token_ids"]
            answer.arrived_at.append(time.monotonic())
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


class Asking:
    """Asks under way."""

    def __init__(self, answers: Sequence[Answer], futures: Sequence[Future[None]]) -> None:
        self._answers = answers
        self._futures = futures

    @property
    def over(self) -> bool:
        return all(future.done() for future in self._futures)

    @property
    def has_begun(self) -> bool:
        """A token has come."""
        return any(answer.token_ids for answer in self._answers)

    def answers(self) -> list[Answer]:
        """Waits for them all."""
        for future in self._futures:
            future.result(2 * ANSWER_S)
        return list(self._answers)


@contextmanager
def asking(url: str, model: str, asks: Sequence[Ask], *, salt: str) -> Iterator[Asking]:
    """All of them, each at its time; leaves the block when all have ended."""
    answers = [Answer(ask) for ask in asks]

    def run(answer: Answer) -> None:
        time.sleep(answer.ask.at_s)
        _follow(url, model, salt, answer)

    with ThreadPoolExecutor(len(answers)) as threads:
        yield Asking(answers, [threads.submit(run, answer) for answer in answers])
