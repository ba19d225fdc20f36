"""Makes one server of two of vLLM's, a prefill and a decode instance that hand KV over by NIXL.

    python -m benchmarks.peers.proxy --port 8000 --prefill http://… --decode http://…

vLLM leaves it to a proxy to ask the prefill instance for one token first and to pass on to the
decode instance what it says of the KV blocks. This one parses no answer that is streamed, so that
little of what is measured is its own.
"""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_TO_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
"""Compute the KV, and keep it until it was fetched."""
_STREAMING = ("stream", "stream_options", "max_completion_tokens")


class Proxy:
    """An ASGI application. What is no chat goes to the decode instance alone."""

    def __init__(self, prefill: httpx.AsyncClient, decode: httpx.AsyncClient) -> None:
        self._prefill = prefill
        self._decode = decode

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, content = scope["path"], await _body(receive)
        headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
        if path.endswith("/completions"):
            asked = json.loads(content)
            prefilled = await self._prefill.post(path, json=prefill_request(asked), headers=headers)
            if prefilled.is_error:
                await _respond(send, prefilled.status_code, prefilled.headers)
                await send({"type": "http.response.body", "body": prefilled.content})
                return
            params = prefilled.json()["kv_transfer_params"]
            content = json.dumps({**asked, "kv_transfer_params": params}).encode()
        sent = self._decode.stream(scope["method"], path, content=content, headers=headers)
        async with sent as response:
            await _respond(send, response.status_code, response.headers)
            async for data in response.aiter_raw():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


def prefill_request(asked: Message) -> dict[str, Any]:
    """What the prefill instance is asked for, of what a client has asked for."""
    kept = {name: value for name, value in asked.items() if name not in _STREAMING}
    return {**kept, "max_tokens": 1, "stream": False, "kv_transfer_params": _TO_PREFILL}


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _respond(send: Send, status: int, headers: httpx.Headers) -> None:
    kind = headers.get("content-type", "application/json").encode()
    head = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": head})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.proxy")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    given = parser.parse_args()
    clients = (
        httpx.AsyncClient(base_url=url, timeout=None, trust_env=False)
        for url in (given.prefill, given.decode)
    )
    uvicorn.run(
        Proxy(*clients), host="127.0.0.1", port=given.port, log_level="warning", lifespan="off"
    )


if __name__ == "__main__":
    main()
