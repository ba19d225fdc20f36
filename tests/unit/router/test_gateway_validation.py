"""Bad requests: every one is a 4xx in the OpenAI shape that names the field."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.fake_gateway import MODEL, Gateway, chat_body, error_of, worker_status

from router.status import ClusterStatus

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def gateway() -> Gateway:
    return Gateway(max_choices=4)


BAD_CHATS = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": 10**40}, "max_tokens"),
    ({"max_tokens": 16.0}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_completion_tokens": 10**12}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": ["a", 5]}, "stop.1"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
    ({"stop_token_ids": [49152]}, "stop_token_ids.0"),
    ({"stop_token_ids": [3, -1]}, "stop_token_ids.1"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"logit_bias": {"49152": 1}}, "logit_bias.49152"),
    ({"logit_bias": {"the": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"007": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 1.5}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"min_tokens": 10**6}, "min_tokens"),
    ({"priority": "high"}, "priority"),
    ({"priority": 1.0}, "priority"),
    ({"priority": True}, "priority"),
    ({"priority": 2**63}, "priority"),
    ({"priority": -(2**63) - 1}, "priority"),
    ({"temprature": 1}, "temprature"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [5]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]}]},
        "messages.0.tool_calls",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages.0.content.0.text",
    ),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS)
async def test_bad_chat_names_its_field(gateway: Gateway, fields, param) -> None:
    response = await gateway.chat(**fields)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": [[1], []]}, "prompt.1"),
    ({"prompt": ["a", ""]}, "prompt.1"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": [1, "a"]}, "prompt.1"),
    ({"prompt": [1, True]}, "prompt.1"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [5, 49152]}, "prompt.1"),
    ({"prompt": [2**40]}, "prompt.0"),
    ({"prompt": [[1], [2, 49152]]}, "prompt.1.1"),
    ({"prompt": [[49152]]}, "prompt.0.0"),
    ({"prompt": ["a"] * 5}, "prompt"),
    ({"prompt": ["a"] * 2, "n": 3}, "n"),
    ({"echo": True}, "echo"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS)
async def test_bad_completion_names_its_field(gateway: Gateway, fields, param) -> None:
    response = await gateway.complete(**fields)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


BAD_BODIES = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'"text"', None),
    (b"\xff\xfe{}", None),
    (b'{"model": "\xff"}', None),
    (b"[" * 100_000, None),
    (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, None),
    (b'{"temperature": NaN}', "temperature"),
    (b'{"stop": ["a", Infinity]}', "stop.1"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content"),
    (b'{"\\udc00": 1}', None),
    (b'{"max_tokens": ' + b"9" * 5_000 + b"}", None),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_body_that_is_no_json_is_refused_and_the_field_named(
    gateway: Gateway, body: bytes, param: str | None
) -> None:
    response = await gateway.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


async def test_number_that_overflows_to_infinity_is_refused(gateway: Gateway) -> None:
    body = json.dumps(chat_body()).replace("{", '{"temperature": 1e999, ', 1).encode()
    response = await gateway.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_body_of_another_media_type_is_refused(gateway: Gateway, headers) -> None:
    response = await gateway.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


async def test_media_type_with_a_charset_of_utf8_is_accepted(gateway: Gateway) -> None:
    headers = {"content-type": "Application/JSON; charset=UTF-8"}
    content = json.dumps(chat_body())
    response = await gateway.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 200


async def test_unknown_model_is_404_and_names_the_served_one(gateway: Gateway) -> None:
    response = await gateway.chat(model="gpt-9")
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/models", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_route_or_method_has_the_same_shape(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    async with gateway.client() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code


async def test_prompt_that_fills_the_context_is_refused_with_the_numbers(gateway) -> None:
    response = await gateway.complete([5] * 8192)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "8192" in error["message"]
    assert (await gateway.complete([5] * 8191)).status_code == 200


async def test_giant_prompt_is_refused_in_chats_too(gateway) -> None:
    error = error_of(await gateway.chat("word " * 20_000))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_max_tokens_that_do_not_fit_are_refused_and_those_that_do_are_not(gateway) -> None:
    assert (await gateway.complete([5] * 8000, max_tokens=192)).status_code == 200
    error = error_of(await gateway.complete([5] * 8000, max_tokens=193))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "192" in error["message"]


async def test_context_is_what_the_largest_ready_decode_worker_holds() -> None:
    gateway = Gateway()
    workers = (
        worker_status("decode-0", max_model_len=100),
        worker_status("decode-1", max_model_len=50),
        worker_status("decode-2", max_model_len=200, ready=False),
        worker_status("prefill-0", max_model_len=20, role="prefill"),
    )
    gateway.orchestrator.cluster = ClusterStatus(workers, registry_up=True)
    assert "holds 100 tokens" in error_of(await gateway.complete([5] * 100))["message"]
    assert (await gateway.complete([5] * 99)).status_code == 200
    assert gateway.orchestrator.choices[-1].max_tokens == 1


async def test_what_a_worker_held_that_was_lost_may_be_asked_again() -> None:
    gateway = Gateway()
    gateway.orchestrator.cluster = ClusterStatus(
        (worker_status("decode-0", max_model_len=100),),
        registry_up=True,
        recent_max_model_len=200,
    )
    for refused in (
        await gateway.complete([5] * 150),
        await gateway.complete([5] * 50, max_tokens=51),
        await gateway.complete([5] * 100, max_tokens=100),
    ):
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert "hold 100, and one that held 200 was lost" in error_of(refused)["message"]
    error = error_of(await gateway.complete([5] * 200))
    assert error["code"] == "context_length_exceeded"
    assert "the largest decode worker holds 100 tokens" in error["message"]
    assert (await gateway.complete([5] * 50, max_tokens=50)).status_code == 200
    assert (await gateway.complete([5] * 50)).status_code == 200


async def test_context_without_a_ready_worker_is_what_the_largest_decode_pool_may_hold() -> None:
    pools = {
        "prefill": {"engine": {"max_model_len": 400}},
        "decode": {},
        "decode-long": {"role": "decode", "engine": {"max_model_len": 200}},
    }
    gateway = Gateway(sections={"engine": {"max_model_len": 100}, "pools": pools})
    gateway.orchestrator.cluster = ClusterStatus((), registry_up=True)
    assert (await gateway.complete([5] * 200)).status_code == 400
    assert (await gateway.complete([5] * 199)).status_code == 200
    # Workers know their own pool's settings, which may be larger than those of all pools.
    gateway.orchestrator.cluster = ClusterStatus(
        (worker_status(max_model_len=200),), registry_up=True
    )
    assert (await gateway.complete([5] * 199)).status_code == 200


async def test_body_over_the_limit_is_413_whether_its_length_is_declared_or_not() -> None:
    gateway = Gateway(max_body_bytes=2048)
    body = json.dumps(chat_body("x" * 4000)).encode()
    declared = await gateway.post("/v1/chat/completions", content=body, headers=JSON)

    async def chunks():
        for at in range(0, len(body), 512):
            yield body[at : at + 512]

    chunked = await gateway.post("/v1/chat/completions", content=chunks(), headers=JSON)
    for response in (declared, chunked):
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
    assert (await gateway.chat("x" * 1000)).status_code == 200


async def test_body_that_is_too_large_is_answered_before_it_is_sent() -> None:
    gateway = Gateway(max_body_bytes=2048)
    async with gateway.served() as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000000\r\n\r\n{"
        )
        async with asyncio.timeout(10):
            status = await reader.readline()
        writer.close()
    assert b"413" in status


async def test_server_goes_on_after_every_kind_of_bad_request(gateway: Gateway) -> None:
    for body, _ in BAD_BODIES:
        await gateway.post("/v1/completions", content=body, headers=JSON)
    assert (await gateway.chat()).status_code == 200


async def test_bad_requests_reach_no_worker_and_are_counted_by_their_code() -> None:
    gateway = Gateway()
    await gateway.chat(temperature="hot")
    await gateway.chat(model="x")
    await gateway.chat(tools=[{}])
    assert gateway.orchestrator.choices == []
    counted = {
        code: gateway.metric("baton_requests_total", outcome=code)
        for code in ("invalid_request", "model_not_found", "unsupported", "ok")
    }
    assert counted == {"invalid_request": 1, "model_not_found": 1, "unsupported": 1, "ok": 0}
    assert gateway.metric("baton_requests_in_flight") == 0


async def test_prompt_text_is_never_logged(gateway: Gateway, caplog) -> None:
    with caplog.at_level("DEBUG"):
        await gateway.chat("a sentence that is secret")
        await gateway.chat("a sentence that is secret", temperature="hot")
    assert "secret" not in caplog.text
    assert "35 prompt and 5 completion tokens" in caplog.text
