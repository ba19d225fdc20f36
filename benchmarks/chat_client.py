"""One streaming request over HTTP/1.1, to any server of OpenAI's chat API.

httpx reads what the socket has, so a read's time is the time its tokens came. The code
blocks; under locust, whose gevent makes blocking switch, many requests run at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from baton.credentials import bearer
from benchmarks.chat_stream import ChatStream, RequestFailed, error_sentence

_PATH = "/v1/chat/completions"


def new_client(url: str, *, api_key: str = "", timeout_s: float) -> httpx.Client:
    """For ``url`` with or without ``/v1``; ``timeout_s`` bounds each silence."""
    headers = {b"Accept-Encoding": b"identity"}
    if key := api_key.strip():
        headers[b"Authorization"] = bearer(key)
    return httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(timeout_s, pool=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    max_model_len: int | None
    """In tokens; None where the server does not tell."""


def served_model(client: httpx.Client) -> ServedModel:
    """The first model that the server has. Raises RequestFailed."""
    try:
        answer = client.get("/v1/models")
        if answer.status_code != 200:
            raise RequestFailed("status", f"{answer.status_code} for /v1/models")
        first = answer.json()["data"][0]
        return ServedModel(str(first["id"]), first.get("max_model_len"))
    except httpx.HTTPError as error:
        raise RequestFailed("connect", f"{client.base_url}: {_words(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RequestFailed("malformed", "/v1/models is no list of models") from None


def ask(
    client: httpx.Client,
    body: Mapping[str, Any],
    stream: ChatStream,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Posts ``body`` and reads the answer into ``stream``, to its end.

    Raises RequestFailed: whatever is not a whole answer, one that takes longer than
    ``timeout_s`` since the stream's beginning included.
    """
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began = False
    try:
        with client.stream("POST", _PATH, json=asked) as response:
            _check(response)
            began = True
            for data in response.iter_raw():
                now = clock()
                stream.push(data, now)
                if now - stream.began_at > timeout_s:
                    raise RequestFailed("timeout", f"no end after {timeout_s:g} s")
            stream.end(clock())
    except httpx.TimeoutException as error:
        raise RequestFailed("timeout", _words(error)) from None
    except httpx.HTTPError as error:
        raise RequestFailed("cut" if began else "connect", _words(error)) from None


def _check(response: httpx.Response) -> None:
    """Raises RequestFailed unless this is a stream of events."""
    if response.status_code != 200:
        response.read()
        try:
            detail = error_sentence(response.json())
        except ValueError:
            detail = response.text
        raise RequestFailed("status", f"{response.status_code} {detail}")
    kind = response.headers.get("content-type", "nothing")
    if not kind.startswith("text/event-stream"):
        raise RequestFailed("no stream", f"200 with content-type {kind}")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
