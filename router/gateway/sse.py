"""Server-sent events, as the OpenAI API uses them.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

# Made once: json.dumps() makes an encoder for every call with separators.
_encode = json.JSONEncoder(separators=(",", ":")).encode

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx kind would hold tokens back otherwise.
    (b"x-accel-buffering", b"no"),
]


def to_json(value: Mapping[str, Any]) -> bytes:
    """All ASCII: readers that split lines at U+2028 and the like find none in it."""
    return _encode(value).encode()


def event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"


def event_after(head: bytes, rest: Mapping[str, Any]) -> bytes:
    """``head``, an object as JSON, and ``rest`` as one object; neither is empty."""
    return b"data: " + head[:-1] + b"," + to_json(rest)[1:] + b"\n\n"


class EventStream:
    """The response; its status is sent with its first bytes, and no sooner."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, data: bytes, *, last: bool = False) -> None:
        if not self.started:
            self.started = True
            start = {"type": "http.response.start", "status": 200, "headers": list(_HEADERS)}
            await self._send(start)
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
