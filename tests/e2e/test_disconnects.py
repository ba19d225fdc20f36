"""A client that leaves, at any moment, leaves nothing behind."""

from __future__ import annotations

import functools
import itertools
import json
import socket
from collections.abc import Callable

import pytest
from e2e.conftest import Serving
from support.prompts import long_text
from support.server import BatonServer, wait_until

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
HAND_OFF = MOMENTS[MOMENTS.index("prefill.proceed") : MOMENTS.index("decode.step")]
"""Where the transport matters."""
WHOLE = ("gateway.admitted", "prefill.chunk", "decode.copy", "decode.step")
"""An answer that is not streamed is given up in another way, and cancelled in the same: one
moment for each of those who are told of it."""
TELLING = {
    *(("shared_memory", moment, "streaming") for moment in MOMENTS),
    *(("shared_memory", moment, "whole") for moment in WHOLE),
    *(("gloo", moment, "streaming") for moment in HAND_OFF),
}
CASES = [
    pytest.param(*case, marks=[] if case in TELLING else pytest.mark.exhaustive)
    for case in itertools.product(("shared_memory", "gloo"), MOMENTS, ("streaming", "whole"))
]
DELAY_S = 0.4
PROMPT_CHARACTERS = 2400


@pytest.fixture(scope="module")
def servers(serving: Serving) -> Callable[[str], BatonServer]:
    """By transport, each started when it is first asked for."""

    @functools.cache
    def start(transport: str) -> BatonServer:
        server = serving(
            settings={
                "kv_transfer": {"transport": transport, "verify": True},
                "session": {"report_s": 0.1},
                "engine": {"kv_cache_bytes": 134_217_728},
            }
        )
        server.complete(prompt="warm", max_tokens=2)
        return server

    return start


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Callable[[str], BatonServer]) -> BatonServer:
    return servers(request.param)


def leave(server: BatonServer, moment: str, *, prompt: str, stream: bool, salt: str) -> None:
    """Sends a request and closes the connection while that moment is drawn out."""
    reached = server.folder / "reached"
    reached.unlink(missing_ok=True)
    drawn_out = {"action": "delay", "seconds": DELAY_S, "reached": str(reached)}
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
    server.inject(**{moment.replace(".", "__"): drawn_out})
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: baton\r\n"
            b"Content-Type: application/json\r\n"
            b"Content-Length: " + str(len(payload)).encode() + b"\r\n\r\n" + payload
        )
        wait_until(reached.exists, timeout_s=30, what=moment, poll_s=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("server", "moment", "kind"), CASES, indirect=["server"])
def test_client_that_leaves_gives_every_block_back(
    server: BatonServer, moment: str, kind: str
) -> None:
    before = server.page()
    prompt = long_text()[:PROMPT_CHARACTERS]
    leave(server, moment, prompt=prompt, stream=kind == "streaming", salt=f"{moment} {kind}")
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
@pytest.mark.parametrize(
    ("server", "moments"),
    [("shared_memory", MOMENTS), ("gloo", HAND_OFF)],
    ids=["shared_memory", "gloo"],
    indirect=["server"],
)
def test_repeated_request_that_is_left_changes_no_block_state(
    server: BatonServer, moments: tuple[str, ...]
) -> None:
    prompt = long_text()[:PROMPT_CHARACTERS]
    server.complete(prompt=prompt, max_tokens=2, cache_salt="repeated")
    baseline = server.wait_at_rest().blocks()
    for moment in moments:
        leave(server, moment, prompt=prompt, stream=True, salt="repeated")
        assert server.wait_at_rest().blocks() == baseline, moment
    server.inject()
