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


class Judge:
    """Says what the oracle says at each place of an answer; of the same answer only once."""

    def __init__(self, oracle: Oracle) -> None:
        text = oracle.encode(long_text())
        self.prompts = {f"{length} tokens": text[:length] for length in LENGTHS}
        self.prompts |= {question: oracle.encode_chat(question) for question in CHATS}
        self._oracle = oracle
        self._said: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def greedy_at(self, name: str, answer: list[int]) -> list[int]:
        key = (name, tuple(answer))
        if key not in self._said:
            self._said[key] = self._oracle.greedy_at(self.prompts[name], answer)
        return self._said[key]

    def is_whole(self, answer: list[int]) -> bool:
        """It ends at the first end-of-sequence token, else at the length that was asked for."""
        ends = [
            number for number, token in enumerate(answer) if token in self._oracle.eos_token_ids
        ]
        return len(answer) == (ends[0] + 1 if ends else NUM_TOKENS)


@pytest.fixture(scope="session")
def judge(oracle: Oracle) -> Judge:
    return Judge(oracle)


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


def assert_greedy(server: BatonServer, judge: Judge, concurrency: int) -> None:
    assert len(judge.prompts) == 30
    with ThreadPoolExecutor(concurrency) as pool:
        futures = {
            name: pool.submit(answer, server, name, prompt)
            for name, prompt in judge.prompts.items()
        }
        answers = {name: future.result() for name, future in futures.items()}
    wanted = {name: judge.greedy_at(name, given) for name, given in answers.items()}
    assert answers == wanted
    assert [name for name, given in answers.items() if not judge.is_whole(given)] == []
    server.wait_at_rest()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "server",
    [
        "shared_memory",
        pytest.param("gloo", marks=pytest.mark.exhaustive),
        pytest.param("colocated", marks=pytest.mark.exhaustive),
    ],
    indirect=True,
)
def test_greedy_answers_to_one_at_a_time_equal_the_oracles(
    server: BatonServer, judge: Judge
) -> None:
    assert_greedy(server, judge, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_answers_to_sixteen_at_once_equal_the_oracles(
    server: BatonServer, judge: Judge
) -> None:
    assert_greedy(server, judge, 16)


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
