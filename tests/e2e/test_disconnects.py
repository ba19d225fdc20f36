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
PROMPT_CHARACTERS = 2400


@pytest.fixture(scope="module", params=["shared_memory", "gloo"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    server = serving(
        settings={
            "kv_transfer": {"transport": request.param, "verify": True},
            "session": {"report_s": 0.1},
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
        "max_tokens": 300,
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
    before = server.page()
    server.inject(**{moment.replace(".", "__"): {"action": "delay", "seconds": DELAY_S}})
    leave(
        server,
        prompt=long_text()[:PROMPT_CHARACTERS],
        stream=stream,
        salt=f"{moment} {stream}",
    )
    after = server.wait_at_rest()
    print(f"at rest {server.rest_s:.2f} s after the client had gone")
    server.inject()
    outcome = {"outcome": "cancelled"}
    cancelled = before.metric("baton_requests_total", **outcome)
    assert after.metric("baton_requests_total", **outcome) == cancelled + 1
    assert sum(after.blocks().values()) == sum(before.blocks().values())
    answer = server.complete(prompt="One, two, three,", max_tokens=4)
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_repeated_request_that_is_left_changes_no_block_state(server: BatonServer) -> None:
    prompt = long_text()[:PROMPT_CHARACTERS]
    options: dict[str, Any] = {"prompt": prompt, "max_tokens": 300, "ignore_eos": True}
    server.complete(**options, cache_salt="whole")
    baseline = server.wait_at_rest().blocks()
    for moment in MOMENTS:
        server.inject(**{moment.replace(".", "__"): {"action": "delay", "seconds": DELAY_S}})
        leave(server, prompt=prompt, stream=True, salt="whole")
        assert server.wait_at_rest().blocks() == baseline, moment
    server.inject()
