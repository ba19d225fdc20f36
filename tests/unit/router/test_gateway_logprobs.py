"""Log-probabilities in answers and streams: one entry for every token, in OpenAI's shapes."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest
from support.fake_gateway import EOS, MODEL, Gateway, chat_body, error_of, events, ids_of

from baton.logprobs import TokenLogprobs
from router.request import ChoiceOutput, ChoiceRequest

TEXT = "Hi 🎉"
IDS = [*ids_of(TEXT), EOS]
OTHERS = ids_of(" yes no")
NAMES = ["Hi", " \\xf0\\x9f", "\\x8e", "\\x89", "<|im_end|>"]


def told(position: int, num_top: int) -> TokenLogprobs:
    """The token itself, the second likeliest, and the likeliest, as far as they are wanted."""
    own = -1.0 - position
    top = ((OTHERS[0], -0.5), (IDS[position], own), (OTHERS[1], -math.inf))
    return TokenLogprobs(own, top[:num_top])


def script(choice: ChoiceRequest) -> list[Any]:
    """Two tokens, then the others one by one."""
    num_top = choice.sampling.num_logprobs
    every = [] if num_top is None else [told(at, num_top) for at in range(len(IDS))]
    outputs = [ChoiceOutput(tuple(IDS[:2]), logprobs=tuple(every[:2]))]
    for at in range(2, len(IDS)):
        finish = "stop" if at == len(IDS) - 1 else None
        outputs.append(ChoiceOutput((IDS[at],), finish, logprobs=tuple(every[at : at + 1])))
    return outputs


@pytest.fixture
def gateway() -> Gateway:
    return Gateway(script)


def entry(name: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": name, "logprob": logprob, "bytes": list(data)}


BYTES = [b"Hi", b" \xf0\x9f", b"\x8e", b"\x89", b"<|im_end|>"]


def content(num_top: int) -> list[dict[str, Any]]:
    expected = []
    for at, (name, data) in enumerate(zip(NAMES, BYTES, strict=True)):
        own = entry(name, data, -1.0 - at)
        likeliest = [entry(" yes", b" yes", -0.5), own, entry(" no", b" no", -9999.0)]
        expected.append(own | {"top_logprobs": likeliest[:num_top]})
    return expected


def test_the_text_splits_a_character_over_tokens() -> None:
    assert len(IDS) == 5


@pytest.mark.parametrize("num_top", [0, 2, 3])
async def test_chat_has_an_entry_for_every_token_that_usage_counts(
    gateway: Gateway, num_top: int
) -> None:
    body = (await gateway.chat(logprobs=True, top_logprobs=num_top)).json()
    (choice,) = body["choices"]
    assert choice["message"]["content"] == TEXT
    assert choice["logprobs"] == {"content": content(num_top), "refusal": None}
    assert body["usage"]["completion_tokens"] == len(IDS)
    assert gateway.orchestrator.choices[0].sampling.num_logprobs == num_top


async def test_answers_without_them_say_null(gateway: Gateway) -> None:
    for response in (
        await gateway.chat(),
        await gateway.chat(logprobs=False, top_logprobs=0),
        await gateway.complete(),
    ):
        assert response.json()["choices"][0]["logprobs"] is None
    assert {c.sampling.num_logprobs for c in gateway.orchestrator.choices} == {None}


async def test_chat_stream_gives_each_token_with_its_chunk(gateway: Gateway) -> None:
    body = chat_body(stream=True, logprobs=True, top_logprobs=2)
    chunks = events((await gateway.post("/v1/chat/completions", body)).text)[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [len(choice["logprobs"]["content"]) for choice in choices] == [2, 1, 1, 1]
    joined = [one for choice in choices for one in choice["logprobs"]["content"]]
    assert joined == content(2)
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    assert choices[-1]["finish_reason"] == "stop"


COMPLETION = {
    "text_offset": [0, 2, 3, 3, 4],
    "token_logprobs": [-1.0, -2.0, -3.0, -4.0, -5.0],
    "tokens": ["Hi", "bytes: \\xf0\\x9f", "bytes:\\x8e", "bytes:\\x89", "<|im_end|>"],
}


async def test_completion_names_tokens_by_their_text(gateway: Gateway) -> None:
    (choice,) = (await gateway.complete(logprobs=1)).json()["choices"]
    names = zip(COMPLETION["tokens"], COMPLETION["token_logprobs"], strict=True)
    expected = [{" yes": -0.5, name: logprob} for name, logprob in names]
    assert choice["logprobs"] == COMPLETION | {"top_logprobs": expected}


async def test_completion_stream_counts_offsets_over_its_chunks(gateway: Gateway) -> None:
    body = {"model": MODEL, "prompt": "a", "stream": True, "logprobs": 0}
    chunks = events((await gateway.post("/v1/completions", body)).text)[:-1]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, expected in COMPLETION.items():
        assert [one for each in told for one in each[name]] == expected
    assert [len(one) for each in told for one in each["top_logprobs"]] == [1] * 5


async def test_text_that_a_stop_string_cuts_off_keeps_its_tokens_entries() -> None:
    gateway = Gateway(script)
    body = (await gateway.chat(logprobs=True, stop="🎉")).json()
    assert body["choices"][0]["message"]["content"] == "Hi "
    assert len(body["choices"][0]["logprobs"]["content"]) == 4
    assert body["usage"]["completion_tokens"] == 4


async def test_worker_that_leaves_them_out_is_an_error_and_no_shorter_list() -> None:
    gateway = Gateway(lambda choice: [ChoiceOutput(tuple(IDS), "stop")])
    response = await gateway.chat(logprobs=True)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"


async def test_openai_package_reads_both_shapes() -> None:
    async with (
        Gateway(script).served() as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "Hi"}]
        chat = await client.chat.completions.create(
            model=MODEL, messages=messages, logprobs=True, top_logprobs=2
        )
        told = chat.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        data = b"".join(bytes(one.bytes or []) for one in told.content[:-1])
        assert data.decode() == TEXT
        completion = await client.completions.create(model=MODEL, prompt="a", logprobs=5)
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.text_offset == COMPLETION["text_offset"]
        stream = client.chat.completions.stream(
            model=MODEL, messages=messages, logprobs=True, top_logprobs=1
        )
        async with stream as running:
            final = await running.get_final_completion()
        assert final.choices[0].logprobs is not None
        assert len(final.choices[0].logprobs.content or []) == len(IDS)


async def test_no_infinity_reaches_the_json(gateway: Gateway) -> None:
    text = (await gateway.chat(logprobs=True, top_logprobs=3)).text
    assert "-9999.0" in text

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)
