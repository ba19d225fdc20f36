"""One streamed chat completion: the request, its server-sent events, its timing."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton.errors import UnavailableError
from cluster.server_client import refused

Message = dict[str, str]


@dataclass(slots=True)
class Answer:
    """What came of one request; filled while the stream is read. Times in seconds."""

    began: float
    text: str = ""
    first_at: float | None = None
    last_at: float | None = None
    num_tokens: int | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_at is None else self.first_at - self.began

    @property
    def tokens_per_s(self) -> float | None:
        """After the first token; None for answers too short to have a rate."""
        if self.first_at is None or self.last_at is None or (self.num_tokens or 0) < 2:
            return None
        span = self.last_at - self.first_at
        return ((self.num_tokens or 0) - 1) / span if span > 0 else None


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to ``[DONE]``; comments are skipped.

    Raises UnavailableError when the stream ends without ``[DONE]``.
    """
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif line == "" and data:
            payload = "\n".join(data)
            data = []
            if payload == "[DONE]":
                return
            yield json.loads(payload)
    raise UnavailableError("the server broke the answer off")


def _error_message(body: Any, otherwise: str) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or otherwise)


def stream_chat(client: httpx.Client, body: dict[str, Any], answer: Answer) -> Generator[str]:
    """Sends ``body`` and yields pieces of text as they come, noting all in ``answer``.

    Closing the iterator closes the connection, which cancels the request.
    Raises UnavailableError with the server's own sentence.
    """
    wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
    url = str(client.base_url).rstrip("/")
    try:
        with client.stream("POST", "/v1/chat/completions", json=wanted) as response:
            if response.status_code != 200:
                raise UnavailableError(_refusal(response))
            for event in events(response.iter_lines()):
                yield from _take(event, answer)
    except httpx.HTTPError as error:
        raise refused(url, error) from None


def _refusal(response: httpx.Response) -> str:
    text = response.read().decode(errors="replace")
    try:
        return _error_message(json.loads(text), text)
    except ValueError:
        return f"the server answered {response.status_code}: {text[:200]}"


def _take(event: dict[str, Any], answer: Answer) -> Iterator[str]:
    if "error" in event:
        raise UnavailableError(_error_message(event, "the server reported an error"))
    if usage := event.get("usage"):
        answer.usage = usage
        answer.num_tokens = usage.get("completion_tokens")
    for choice in event.get("choices", ()):
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if text := (choice.get("delta") or {}).get("content"):
            answer.last_at = time.monotonic()
            if answer.first_at is None:
                answer.first_at = answer.last_at
            answer.text += text
            yield text
