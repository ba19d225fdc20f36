"""Streams: events, order, keep-alive, and errors that look like nothing else."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from support.fake_gateway import EOS, Gateway, answer, chat_body, events, ids_of

from baton.errors import WorkerLostError


def text_of_choice(found: list, index: int = 0) -> str:
    parts = []
    for one in found:
        for choice in one["choices"] if isinstance(one, dict) else ():
            if choice["index"] == index:
                parts.append(
                    choice["delta"].get("content", "") if "delta" in choice else choice["text"]
                )
    return "".join(parts)


async def test_chat_stream_is_role_then_text_then_reason_then_done() -> None:
    response = await Gateway().chat(stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    found = events(response.text)
    assert found.pop() == "data: [DONE]"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Hello"}
    assert all("role" not in one["choices"][0]["delta"] for one in found[1:])
    assert text_of_choice(found) == "Hello, world!"
    reasons = [one["choices"][0]["finish_reason"] for one in found]
    assert reasons == [*[None] * (len(found) - 1), "stop"]
    assert len({one["id"] for one in found}) == 1
    assert {one["object"] for one in found} == {"chat.completion.chunk"}
    assert all("usage" not in one for one in found)


async def test_completion_stream_carries_text() -> None:
    gateway = Gateway(lambda choice: answer(" Rome is old", end="length"))
    found = events((await gateway.complete(stream=True)).text)
    assert text_of_choice(found) == " Rome is old"
    assert found[-2]["choices"][0]["finish_reason"] == "length"
    assert found[0]["object"] == "text_completion"


async def test_usage_comes_last_and_is_null_before() -> None:
    gateway = Gateway(lambda choice: answer("Hello", cached=16))
    options = {"include_usage": True, "include_obfuscation": True}
    found = events((await gateway.chat(stream=True, stream_options=options)).text)
    *chunks, last, done = found
    assert done == "data: [DONE]"
    assert all(one["usage"] is None for one in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 31, "completion_tokens": 2, "total_tokens": 33,
        "prompt_tokens_details": {"cached_tokens": 16},
    }  # fmt: skip


async def test_choices_are_interleaved_under_their_own_index() -> None:
    gates = [asyncio.Event(), asyncio.Event()]

    def script(choice):
        first, last = answer("left right" if choice.choice_index else "up down", end="length")
        # Each choice's second half waits until the other's first half was taken.
        gates[choice.choice_index].set()
        return [first, gates[1 - choice.choice_index], last]

    found = events((await Gateway(script).chat(stream=True, n=2)).text)[:-1]
    order = [one["choices"][0]["index"] for one in found]
    assert sorted(order[:2]) == [0, 1]
    assert text_of_choice(found, 0) == "up down"
    assert text_of_choice(found, 1) == "left right"
    roles = [one["choices"][0]["index"] for one in found if "role" in one["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]


async def test_start_of_a_stop_string_is_never_shown_early() -> None:
    gateway = Gateway(lambda choice: answer("one two three", end="length"))
    found = events((await gateway.complete(stream=True, stop=" two three")).text)
    assert text_of_choice(found) == "one"
    assert found[-2]["choices"][0]["finish_reason"] == "stop"
    held = Gateway(lambda choice: answer("one two thr", end="length"))
    found = events((await held.complete(stream=True, stop=" two three")).text)
    assert text_of_choice(found) == "one two thr"


async def test_every_event_is_whole_json_whatever_the_characters() -> None:
    text = 'a\u2028b\x85c\r\n\n🎉é\x00"\\'
    gateway = Gateway(lambda choice: answer(text, end="length"))
    response = await gateway.complete(stream=True)
    assert response.content.isascii()
    assert text_of_choice(events(response.text)) == text
    # Readers that split at every Unicode line boundary see the same events.
    assert response.text.splitlines() == response.text.split("\n")[:-1]


async def test_character_is_not_split_between_events() -> None:
    gateway = Gateway(lambda choice: answer("é🦕漢", end="length"))
    response = await gateway.complete(stream=True)
    assert "\\ufffd" not in response.text
    assert text_of_choice(events(response.text)) == "é🦕漢"


async def test_token_ids_of_all_events_are_all_tokens_and_the_prompts_stand_first() -> None:
    gateway = Gateway(lambda choice: answer("é🦕 two", cached=0))
    found = events((await gateway.chat(stream=True, return_token_ids=True, stop=" two!")).text)[:-1]
    ids = [one["choices"][0]["token_ids"] for one in found]
    assert list(itertools.chain(*ids)) == [*ids_of("é🦕 two"), EOS]
    assert all(ids)
    prompt = list(gateway.orchestrator.choices[0].prompt_token_ids)
    assert [one.get("prompt_token_ids") for one in found] == [prompt, *[None] * (len(found) - 1)]


async def test_error_in_mid_stream_is_an_event_and_the_end() -> None:
    gateway = Gateway(lambda choice: [*answer("Hello")[:1], WorkerLostError("lost")])
    response = await gateway.chat(stream=True)
    assert response.status_code == 200
    first, last = events(response.text)
    assert first["choices"][0]["delta"]["content"] == "Hello"
    assert last == {
        "error": {
            "message": "lost", "type": "service_unavailable", "param": None, "code": "worker_lost"
        }
    }  # fmt: skip
    assert 'finish_reason":"' not in response.text
    assert gateway.metric("baton_requests_total", outcome="worker_lost") == 1


async def test_text_that_came_at_once_with_an_error_is_shown_before_it() -> None:
    gateway = Gateway(lambda choice: [*answer("Hello")[:1], WorkerLostError("lost")])
    gateway.orchestrator.paced = False
    first, last = events((await gateway.chat(stream=True)).text)
    assert first["choices"][0]["delta"]["content"] == "Hello"
    assert last["error"]["code"] == "worker_lost"


async def test_crash_in_mid_stream_is_an_event_that_tells_nothing(caplog) -> None:
    gateway = Gateway(lambda choice: [*answer("Hello")[:1], ZeroDivisionError("inner detail")])
    response = await gateway.chat(stream=True)
    assert events(response.text)[-1]["error"]["code"] == "internal_error"
    assert "inner detail" not in response.text
    assert "inner detail" in caplog.text


async def stream_until_silent(script, *, comments: int) -> tuple[list, int]:
    """Streams with a short keep-alive; the script's gate opens after so many comments."""
    gate, seen = asyncio.Event(), []

    def on_bytes(data: bytes) -> None:
        if data == b": keep-alive\n\n":
            seen.append(data)
            if len(seen) == comments:
                gate.set()

    gateway = Gateway(lambda choice: script(gate), sse_keepalive_s=0.02)
    async with gateway.client(on_bytes) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(stream=True))
    return events(response.text), response.status_code


async def test_silence_begins_the_stream_and_is_commented_again_and_again() -> None:
    found, _ = await stream_until_silent(lambda gate: [gate, *answer("Hi")], comments=3)
    assert found[:3] == [": keep-alive"] * 3
    assert text_of_choice(found) == "Hi"


async def test_silence_inside_a_stream_is_commented() -> None:
    found, _ = await stream_until_silent(
        lambda gate: [*answer("Hi")[:1], gate, *answer(" you")], comments=1
    )
    texts = [one if isinstance(one, str) else text_of_choice([one]) for one in found]
    place = texts.index(": keep-alive")
    assert "Hi" in texts[:place]
    assert " you" in texts[place:]


async def test_error_after_a_comment_is_an_event() -> None:
    found, status = await stream_until_silent(
        lambda gate: [gate, WorkerLostError("lost")], comments=1
    )
    assert status == 200
    assert found[-1]["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("stream", [False, True])
async def test_deadline_ends_a_silent_request_with_504_and_cancels_it(stream: bool) -> None:
    gateway = Gateway(lambda choice: [asyncio.Event()])
    body = {"model": "test-model", "prompt": "Hi", "stream": stream, "n": 2}
    response = await gateway.post("/v1/completions", body, headers={"X-Baton-Deadline-Ms": "50"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert sorted(gateway.orchestrator.cancelled) == [0, 1]
    assert gateway.metric("baton_requests_total", outcome="deadline_exceeded") == 1


async def test_deadline_in_mid_stream_is_an_error_event() -> None:
    gateway = Gateway(lambda choice: [*answer("Hi")[:1], asyncio.Event()])
    body = {"model": "test-model", "prompt": "Hi", "stream": True}
    response = await gateway.post("/v1/completions", body, headers={"X-Baton-Deadline-Ms": "500"})
    assert events(response.text)[-1]["error"]["code"] == "deadline_exceeded"
    assert gateway.orchestrator.cancelled == [0]
