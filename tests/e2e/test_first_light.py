"""The first minute: `baton serve` as it comes, on Ray, and a real answer."""

from __future__ import annotations

import asyncio

import openai
import pytest
from e2e.conftest import Serving
from support.server import BatonServer, wait_until

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module", params=["ray", "processes"])
def server(request: pytest.FixtureRequest, serving: Serving) -> BatonServer:
    return serving(backend=request.param)


@pytest.fixture
def client(server: BatonServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(question: str) -> list[openai.types.chat.ChatCompletionUserMessageParam]:
    return [{"role": "user", "content": question}]


@pytest.mark.slow
def test_answer_moves_exactly_the_prompts_kv_from_prefill_to_decode(
    server: BatonServer, client: openai.OpenAI
) -> None:
    def moved(direction: str) -> float:
        return server.metric("baton_kv_handoff_bytes_total", direction=direction)

    before = {direction: moved(direction) for direction in ("sent", "received")}
    held = server.metric("baton_prompt_tokens_total", role="decode", source="cached")
    answer = client.chat.completions.create(
        model=server.model(), messages=ask(QUESTION), temperature=0
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    server.wait_at_rest()

    def lacked() -> float:
        now = server.metric("baton_prompt_tokens_total", role="decode", source="cached")
        assert answer.usage is not None
        return answer.usage.prompt_tokens - (now - held)

    layers, kv_heads, head_dim, element = 30, 3, 64, server_element_bytes(server)
    expected = layers * 2 * kv_heads * head_dim * lacked() * element
    wait_until(
        lambda: moved("received") - before["received"] == expected,
        timeout_s=5,
        what=f"{expected} bytes received",
    )
    assert moved("sent") - before["sent"] == expected
    assert server.metric("baton_prompt_tokens_total", role="decode", source="computed") == 0


def server_element_bytes(server: BatonServer) -> int:
    """Of the KV in use: 2 on a CPU with bfloat16, else 4."""
    import torch

    from engine.platform import resolve_dtype

    return torch.empty(0, dtype=resolve_dtype("auto")).element_size()


@pytest.mark.slow
def test_openai_client_streams_the_same_answer(server: BatonServer, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=server.model(),
            messages=ask(QUESTION),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.slow
async def test_sixteen_clients_at_once_get_their_own_answers(server: BatonServer) -> None:
    capitals = {"France": "Paris", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo"}
    model = server.model()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def one(country: str) -> str:
            answer = await client.chat.completions.create(
                model=model,
                messages=ask(f"What is the capital of {country}?"),
                temperature=0,
                max_tokens=24,
            )
            return answer.choices[0].message.content or ""

        countries = [country for country in capitals for _ in range(4)]
        answers = await asyncio.gather(*[one(country) for country in countries])
    assert [capitals[c] in a for c, a in zip(countries, answers, strict=True)] == [True] * 16
