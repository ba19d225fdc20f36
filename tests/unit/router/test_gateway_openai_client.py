"""The real ``openai`` package against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from support.fake_gateway import MODEL, Gateway, answer, ids_of

from baton.errors import OverloadedError, WorkerLostError

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def script(choice):
    if choice.max_tokens == 13:
        return [OverloadedError("full", retry_after_s=1)]
    if choice.max_tokens == 14:
        return [*answer("Paris")[:1], WorkerLostError("lost")]
    return answer("Paris, of course 🎉", cached=16)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with Gateway(script, api_key="secret").served() as url:
        yield f"{url}/v1"


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, n=2, user="me", tools=[], seed=1
    )
    assert [choice.message.content for choice in completion.choices] == ["Paris, of course 🎉"] * 2
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 16


async def test_answer_can_be_sent_back_as_history(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    history = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And Italy?"}]
    second = await client.chat.completions.create(model=MODEL, messages=history)
    assert second.choices[0].message.content == "Paris, of course 🎉"


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Paris, of course 🎉"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids_of(text)) + 1


async def test_chat_stream_helper_accumulates_a_whole_completion(client) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == "Paris, of course 🎉"


async def test_completions_in_all_forms(client: openai.AsyncOpenAI) -> None:
    for prompt in ("a", ["a", "b"], [5, 6], [[5], [6, 7]]):
        completion = await client.completions.create(model=MODEL, prompt=prompt)
        assert {choice.text for choice in completion.choices} == {"Paris, of course 🎉"}
    stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == "Paris, of course 🎉"


async def test_extensions_travel_in_the_extra_body(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(
        model=MODEL, prompt=[5, 6], extra_body={"return_token_ids": True, "top_k": 5}
    )
    assert completion.model_extra["prompt_token_ids"] == [5, 6]
    assert completion.choices[0].model_extra["token_ids"][:-1] == ids_of("Paris, of course 🎉")


async def test_errors_are_the_packages_own_types(url: str, client: openai.AsyncOpenAI) -> None:
    async def chat(**fields):
        return await client.chat.completions.create(
            **{"model": MODEL, "messages": MESSAGES} | fields
        )

    with pytest.raises(openai.BadRequestError) as bad:
        await chat(temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await chat(model="gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.RateLimitError):
        await chat(max_tokens=13)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()


async def test_error_in_mid_stream_is_raised(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, max_tokens=14
    )
    first = await anext(stream)
    assert first.choices[0].delta.content == "Paris"
    with pytest.raises(openai.APIError, match="lost"):
        await anext(stream)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_synchronous_client(url: str) -> None:
    def work() -> tuple[str | None, str, str]:
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            plain = client.completions.create(model=MODEL, prompt="a")
            return whole.choices[0].message.content, text, plain.choices[0].text

    assert await asyncio.to_thread(work) == ("Paris, of course 🎉",) * 3
