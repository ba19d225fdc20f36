"""A client that leaves, at any moment, leaves nothing behind."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from e2e.conftest import Serving
from support.prompts import long_text
from support.server import BatonServer

MOMENTS = (
    "gateway.admitted",
    "decode.open",
    "decode.reserved",
    "prefill.proceed",
    "prefill.chunk",
    "prefill.offer",
    "prefill.commit",
    "decode.attach",
    "decode.copy",
    "decode.release",
    "decode.step",
)
DELAY_S = 0.5
LEAVE_AFTER_S = 0.3
PROMPT_CHARACTERS = 4000


@pytest.fixture(scope="module", params=["shared_memory", "gloo"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    server = serving(
        settings={
            "kv_transfer": {"transport": request.param, "verify": True},
            "engine": {"kv_cache_bytes": 134_217_728},
        }
    )
    server.complete(prompt="warm", max_tokens=2)
    return server


def leave(server: BatonServer, *, prompt: str, stream: bool, salt: str) -> None:
    """Sends a request and closes the connection before it can have been answered."""
    body = {
        "model": server.model(),
        "prompt": prompt,
        "max_tokens": 1500,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "cache_salt": salt,
    }
    payload = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: baton\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: " + str(len(payload)).encode() + b"\r\n\r\n" + payload
        )
        time.sleep(LEAVE_AFTER_S)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_client_that_leaves_gives_every_block_back(
    server: BatonServer, moment: str, stream: bool
) -> None:
    total = sum(server.blocks().values())
    cancelled = server.metric("baton_requests_total", outcome="cancelled")
    server.inject(**{moment.replace(".", "__"): {"action": "delay", "seconds": DELAY_S}})
    leave(
        server,
        prompt=long_text()[:PROMPT_CHARACTERS],
        stream=stream,
        salt=f"{moment} {stream}",
    )
    server.wait_at_rest()
    server.inject()
    assert server.metric("baton_requests_total", outcome="cancelled") == cancelled + 1
    assert sum(server.blocks().values()) == total
    assert server.status_counts() == {"running": 0, "waiting": 0}
    answer = server.complete(prompt="One, two, three,", max_tokens=4)
    assert answer["choices"][0]["finish_reason"] == "length"
    server.wait_at_rest()


@pytest.mark.slow
def test_repeated_request_that_is_left_changes_no_block_state(server: BatonServer) -> None:
    prompt = long_text()[:PROMPT_CHARACTERS]
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 1500, "ignore_eos": True}
    server.complete(**options, cache_salt="whole")
    server.wait_at_rest()
    baseline = server.blocks()
    for moment in MOMENTS:
        server.inject(**{moment.replace(".", "__"): {"action": "delay", "seconds": DELAY_S}})
        leave(server, prompt=prompt, stream=True, salt="whole")
        server.wait_at_rest()
        assert server.blocks() == baseline, moment
    server.inject()
