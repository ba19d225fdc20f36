"""A second turn moves and computes only what is new."""

from __future__ import annotations

from typing import Any

import pytest
from e2e.conftest import Serving
from support.prompts import long_text
from support.server import BatonServer

BLOCK_SIZE = 16
MOST_TRIES = 5
SLOW = {"action": "delay", "seconds": 1.0}
"""Computing, so that a pull pays, however busy the machine is."""
OUTCOMES = ("ready", "connecting", "late")
"""Of pulls that did not fail."""
Counts = dict[str, dict[str, float]]


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


def input_tokens(server: BatonServer) -> Counts:
    server.wait_at_rest()
    return {
        role: {
            source: server.metric("baton_prompt_tokens_total", role=role, source=source)
            for source in ("computed", "cached", "received")
        }
        for role in ("prefill", "decode")
    }


def second_turn(server: BatonServer) -> tuple[int, dict[str, Any], Counts]:
    """Tokens of the first turn's prompt in full blocks; the second turn's usage, and what it
    made of each role."""
    question = f"Summarise in one sentence: {long_text()[:1200]}"
    messages = [{"role": "user", "content": question}]
    first = chat(server, messages)
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Shorter, please."}]
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    before = input_tokens(server)
    second = chat(server, messages)
    after = input_tokens(server)
    made = {role: {k: after[role][k] - before[role][k] for k in after[role]} for role in after}
    return first["usage"]["prompt_tokens"] // BLOCK_SIZE * BLOCK_SIZE, second["usage"], made


@pytest.mark.slow
def test_second_turn_reuses_the_first_on_both_sides(serving: Serving) -> None:
    server = serving(settings={"routing": {"local_prefill_max_tokens": 0}})
    num_first, usage, made = second_turn(server)
    num_prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    assert num_first <= cached < num_prompt
    decode, prefill = made["decode"], made["prefill"]
    assert decode["computed"] == 0
    assert decode["received"] == num_prompt - decode["cached"]
    assert decode["cached"] >= num_first
    assert decode["cached"] % BLOCK_SIZE == 0
    assert prefill["cached"] + prefill["received"] == cached
    assert prefill["computed"] == num_prompt - cached
    server.inject(prefill__chunk=SLOW)
    for question in range(MOST_TRIES):
        if long_answer_is_pulled(server, question):
            break
    else:
        pytest.fail("no prefill worker has pulled an answer")
    pulls = {how: server.metric("baton_kv_pulls_total", outcome=how) for how in OUTCOMES}
    assert server.metric("baton_kv_pulls_total") == sum(pulls.values()), pulls


def long_answer_is_pulled(server: BatonServer, question: int) -> bool:
    """Whether the prefill of a second turn, after an answer of ten blocks, pulled that answer: the
    first time the workers connect, and where that or a copy takes long it is computed."""
    prompt = [1000 + 37 * question + 3 * token for token in range(5 * BLOCK_SIZE + 3)]
    body = {"max_tokens": 10 * BLOCK_SIZE, "ignore_eos": True}
    answer = server.complete(prompt=prompt, **body)["choices"][0]["token_ids"]
    new = [200, 201, 202, 203, 204]
    before = input_tokens(server)
    second = server.complete(prompt=[*prompt, *answer, *new], max_tokens=4)
    after = input_tokens(server)
    made = {key: after["prefill"][key] - before["prefill"][key] for key in after["prefill"]}
    num_prompt = second["usage"]["prompt_tokens"]
    # Of the last token of the answer nobody has the KV.
    num_held = (len(prompt) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert sum(made.values()) == num_prompt
    assert after["decode"]["cached"] - before["decode"]["cached"] == num_held
    if made["received"] == 0:
        return False
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert made["computed"] == num_prompt - num_held == num_prompt - cached
    assert made["cached"] == 5 * BLOCK_SIZE
    return True


@pytest.mark.slow
def test_by_default_the_worker_that_holds_a_conversation_goes_on_with_it(serving: Serving) -> None:
    server = serving()
    num_first, usage, made = second_turn(server)
    num_prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    assert set(made["prefill"].values()) == {0}
    assert made["decode"] == {"computed": num_prompt - cached, "cached": cached, "received": 0}
    assert cached > num_first, "the first turn's answer was computed again"
