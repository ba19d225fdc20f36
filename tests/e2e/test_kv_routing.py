"""Requests go to the workers that hold their KV, of two prefill and two decode workers."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.conftest import Serving
from support.prompts import long_text
from support.server import BatonServer

BLOCK_SIZE = 16
NUM_CONVERSATIONS = 6
SMALL_BYTES = 80 * 1024 * 1024
"""About 110 blocks: too small on one worker for all conversations, enough on two."""


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving(
        arguments=("--prefill", "2", "--decode", "2"),
        settings={
            "engine": {"dtype": "float32", "kv_cache_bytes": SMALL_BYTES},
            "routing": {"policy": "kv_aware"},
        },
    )


def chat(server: BatonServer, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"model": server.model(), "messages": messages, "temperature": 0, "max_tokens": 24}
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def decode_cached(server: BatonServer) -> float:
    return server.metric("baton_prompt_tokens_total", role="decode", source="cached")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_second_turns_go_to_the_workers_that_hold_the_first(server: BatonServer) -> None:
    text = long_text()
    conversations: list[list[dict[str, str]]] = []
    held: list[int] = []
    for number in range(NUM_CONVERSATIONS):
        question = f"{number}. Summarise in one sentence: {text[number * 700 :][:1000]}"
        messages = [{"role": "user", "content": question}]
        first = chat(server, messages)
        answer = first["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Shorter, please."},
        ]
        conversations.append(messages)
        held.append(first["usage"]["prompt_tokens"] // BLOCK_SIZE * BLOCK_SIZE)
    server.wait_at_rest()

    order = list(range(NUM_CONVERSATIONS))
    random.Random(0).shuffle(order)
    for number in order:
        before = decode_cached(server)
        second = chat(server, conversations[number])
        server.wait_at_rest()
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= held[number], "prefill computed what another worker holds"
        kept = decode_cached(server) - before
        assert kept >= held[number], "the hand-off moved what another worker holds"

    assert_index_is_true(server)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_index_is_true_after_a_crowd_that_the_caches_cannot_hold(server: BatonServer) -> None:
    text = long_text()
    questions = [f"{number}. {text[number * 300 :][:1500]}" for number in range(12)]
    with ThreadPoolExecutor(6) as threads:
        asked = [{"role": "user", "content": question} for question in questions]
        answers = list(threads.map(lambda message: chat(server, [message]), asked))
    assert len(answers) == len(questions)
    server.wait_at_rest()
    assert_index_is_true(server)


def assert_index_is_true(server: BatonServer) -> None:
    """At rest every block that is published is cached, on every worker."""
    workers = server.status()["workers"]
    assert len(workers) == 4
    for worker in workers:
        assert worker["num_indexed_blocks"] == worker["num_cached_blocks"], worker
        assert worker["num_indexed_blocks"] > 0, f"{worker['worker_id']} was never used"
