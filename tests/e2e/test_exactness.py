"""At fp32, greedy answers are those of `transformers`, token for token."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.conftest import Oracle, Serving
from support.prompts import CHATS, LENGTHS, long_text
from support.server import BatonServer

NUM_TOKENS = 16
SETTINGS: dict[str, Any] = {
    "engine": {"dtype": "float32", "kv_cache_bytes": 402_653_184},
}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "shared_memory": {"kv_transfer": {"transport": "shared_memory"}},
    "gloo": {"kv_transfer": {"transport": "gloo"}},
    "colocated": {"pools": {"decode": {}}},
}

Prompt = tuple[str, list[int]]


@pytest.fixture(scope="session")
def expected(oracle: Oracle) -> dict[str, tuple[list[int], list[int]]]:
    """name → (prompt's token ids, the oracle's answer)."""
    text = oracle.encode(long_text())
    prompts = {f"{length} tokens": text[:length] for length in LENGTHS}
    prompts |= {question: oracle.encode_chat(question) for question in CHATS}
    return {name: (ids, oracle.greedy(ids, NUM_TOKENS)) for name, ids in prompts.items()}


@pytest.fixture(scope="module", params=list(DEPLOYMENTS))
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    return serving(settings={**SETTINGS, **DEPLOYMENTS[request.param]})


def answer(server: BatonServer, name: str, prompt: list[int]) -> list[int]:
    if name not in CHATS:
        choice = server.complete(prompt=prompt, max_tokens=NUM_TOKENS)["choices"][0]
    else:
        body = {
            "model": server.model(),
            "messages": [{"role": "user", "content": name}],
            "temperature": 0,
            "max_tokens": NUM_TOKENS,
            "return_token_ids": True,
        }
        with server.client() as client:
            response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
    token_ids: list[int] = choice["token_ids"]
    return token_ids


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("concurrency", [1, 16])
def test_greedy_answers_equal_the_oracles(
    server: BatonServer, expected: dict[str, tuple[list[int], list[int]]], concurrency: int
) -> None:
    assert len(expected) == 30
    with ThreadPoolExecutor(concurrency) as pool:
        futures = {
            name: pool.submit(answer, server, name, prompt)
            for name, (prompt, _) in expected.items()
        }
        answers = {name: future.result() for name, future in futures.items()}
    differing = {
        name: (answers[name], wanted)
        for name, (_, wanted) in expected.items()
        if answers[name] != wanted
    }
    assert not differing
    server.wait_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_log_probabilities_are_the_oracles_whatever_the_sampling_parameters(
    server: BatonServer, oracle: Oracle
) -> None:
    prompt = oracle.encode(long_text())[:100]
    body = server.complete(
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        logprobs=3,
        temperature=1.2,
        seed=5,
        presence_penalty=1.0,
        repetition_penalty=1.1,
        min_p=0.05,
    )
    choice = body["choices"][0]
    logits = oracle.logits(prompt + choice["token_ids"])[len(prompt) - 1 : -1]
    raw = logits.log_softmax(-1)
    told = choice["logprobs"]["token_logprobs"]
    assert told == pytest.approx(
        [row[token].item() for row, token in zip(raw, choice["token_ids"], strict=True)], abs=1e-3
    )
    for row, likeliest in zip(raw, choice["logprobs"]["top_logprobs"], strict=True):
        best = sorted(likeliest.values(), reverse=True)[:3]
        assert best == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
