"""A second turn moves and computes only what is new."""

from __future__ import annotations

from typing import Any

import pytest
from e2e.conftest import Serving
from support.prompts import long_text
from support.server import BatonServer

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving()


def chat(server: BatonServer, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {
        "model": server.model(),
        "messages": messages,
        "temperature": 0,
        "max_tokens": 40,
    }
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def input_tokens(server: BatonServer, role: str) -> dict[str, float]:
    return {
        source: server.metric("baton_prompt_tokens_total", role=role, source=source)
        for source in ("computed", "cached", "received")
    }


@pytest.mark.slow
def test_second_turn_reuses_the_first_on_both_sides(server: BatonServer) -> None:
    question = f"Summarise in one sentence: {long_text()[:1200]}"
    messages = [{"role": "user", "content": question}]
    first = chat(server, messages)
    server.wait_at_rest()
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Shorter, please."}]
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    before = {role: input_tokens(server, role) for role in ("prefill", "decode")}
    second = chat(server, messages)
    server.wait_at_rest()
    after = {role: input_tokens(server, role) for role in ("prefill", "decode")}

    first_blocks = first["usage"]["prompt_tokens"] // BLOCK_SIZE
    num_prompt = second["usage"]["prompt_tokens"]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first_blocks * BLOCK_SIZE
    assert cached < num_prompt

    decode = {k: after["decode"][k] - before["decode"][k] for k in after["decode"]}
    prefill = {k: after["prefill"][k] - before["prefill"][k] for k in after["prefill"]}
    assert decode["computed"] == 0
    assert decode["received"] == num_prompt - decode["cached"]
    assert decode["cached"] >= first_blocks * BLOCK_SIZE
    assert decode["cached"] % BLOCK_SIZE == 0
    assert prefill["cached"] == cached
    assert prefill["computed"] == num_prompt - cached
