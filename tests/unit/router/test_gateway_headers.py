"""Request ids, traces, deadlines and the API key."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from starlette.datastructures import Headers
from support.fake_gateway import Gateway, chat_body, error_of

from baton.config import GatewayConfig
from baton.errors import InvalidRequestError
from router.gateway.headers import deadline_s, request_id, trace_context

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_request_id_comes_back_and_goes_to_the_workers() -> None:
    gateway = Gateway()
    response = await gateway.post(
        "/v1/chat/completions", chat_body(), headers={"X-Request-Id": "mine 1"}
    )
    assert response.headers["x-request-id"] == "mine 1"
    assert gateway.orchestrator.choices[0].request_id == "mine 1"


@pytest.mark.parametrize("given", ["", "  ", "a" * 129, "caf\u00e9", "tab\there"])
def test_unsuitable_request_id_is_replaced(given: str) -> None:
    headers = Headers(raw=[(b"x-request-id", given.encode("latin-1"))])
    first, second = request_id(headers), request_id(headers)
    assert re.fullmatch(r"req-[0-9a-f]{32}", first)
    assert first != second


@pytest.mark.parametrize(
    "path", ["/health", "/nope", "/v1/chat/completions", "/v1/models/x", "/metrics"]
)
async def test_every_response_has_a_request_id_errors_too(path: str) -> None:
    response = await Gateway().get(path)
    assert response.headers["x-request-id"].startswith("req-")


async def test_stream_has_a_request_id() -> None:
    assert "x-request-id" in (await Gateway().chat(stream=True)).headers


async def test_trace_context_is_passed_on() -> None:
    gateway = Gateway()
    headers = {"traceparent": PARENT, "tracestate": "a=1,b=2"}
    await gateway.post("/v1/chat/completions", chat_body(), headers=headers)
    (choice,) = gateway.orchestrator.choices
    assert (choice.traceparent, choice.tracestate) == (PARENT, "a=1,b=2")


@pytest.mark.parametrize("parent", [PARENT, PARENT.replace("00-", "cc-", 1) + "-what-comes-later"])
def test_wellformed_traceparent_is_kept(parent: str) -> None:
    assert trace_context(Headers({"traceparent": parent})).traceparent == parent


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        PARENT.upper(),
        PARENT + "-more",
        PARENT.replace("00-", "ff-", 1),
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        PARENT[:-1],
    ],
)
def test_malformed_traceparent_begins_a_new_trace_without_the_old_state(parent: str) -> None:
    trace = trace_context(Headers({"traceparent": parent, "tracestate": "a=1"}))
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", trace.traceparent)
    assert trace.traceparent != parent
    assert trace.tracestate == ""


def test_two_traceparents_are_malformed() -> None:
    pair = (b"traceparent", PARENT.encode())
    assert trace_context(Headers(raw=[pair, pair])).traceparent != PARENT


def test_deadline_is_the_header_in_seconds_or_the_default() -> None:
    config = GatewayConfig(default_deadline_s=7, max_deadline_s=60)
    assert deadline_s(Headers({}), config) == 7
    assert deadline_s(Headers({"x-baton-deadline-ms": "1500"}), config) == 1.5
    assert deadline_s(Headers({"x-baton-deadline-ms": "60000"}), config) == 60


@pytest.mark.parametrize("given", ["0", "-5", "1.5", "soon", "", "60001", "9" * 30, "٣"])
def test_unsuitable_deadline_names_the_header(given: str) -> None:
    headers = Headers(raw=[(b"x-baton-deadline-ms", given.encode())])
    with pytest.raises(InvalidRequestError) as caught:
        deadline_s(headers, GatewayConfig(default_deadline_s=7, max_deadline_s=60))
    assert caught.value.param == "X-Baton-Deadline-Ms"


async def test_deadline_reaches_the_orchestrator_on_the_loops_clock() -> None:
    gateway = Gateway()
    before = asyncio.get_running_loop().time()
    await gateway.post(
        "/v1/chat/completions", chat_body(), headers={"x-baton-deadline-ms": "60000"}
    )
    after = asyncio.get_running_loop().time()
    assert before + 60 <= gateway.orchestrator.choices[0].deadline <= after + 60


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer", "Basic secret", "bearer sécret", "Bearer secret2"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nope"])
async def test_api_key_is_wanted_under_v1(path: str, given: str | None) -> None:
    gateway = Gateway(api_key="secret")
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    response = await gateway.get(path, headers=headers)
    assert response.status_code == 401
    assert error_of(response)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


async def test_right_api_key_opens_and_other_paths_need_none() -> None:
    gateway = Gateway(api_key="secret")
    headers = {"authorization": "Bearer secret"}
    assert (await gateway.get("/v1/models", headers=headers)).status_code == 200
    assert (await gateway.get("/health")).status_code == 200
    assert (await gateway.get("/metrics")).status_code == 200


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        (b"bearer secret", 200),
        (b"BEARER secret", 200),
        (b"Bearer secret ", 200),
        (b"Bearer  secret", 200),
        (b"bearer Secret", 401),
        (b"Bearer secret x", 401),
        (b"Bearer s\xc3\xa9cret", 401),
        (b"Bearer s\xe9cret", 401),
    ],
)
async def test_scheme_of_any_case_and_blanks_around_the_key_are_taken(
    shown: bytes, status: int
) -> None:
    async with Gateway(api_key="secret").served() as url:
        port = httpx.URL(url).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = (b"GET /v1/models HTTP/1.1", b"Host: h", b"Authorization: " + shown, b"", b"")
        writer.write(b"\r\n".join(request))  # as it is: clients' libraries tidy headers
        answer = await reader.readline()
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_request_without_the_key_is_counted_and_reaches_no_worker() -> None:
    gateway = Gateway(api_key="secret")
    assert (await gateway.chat()).status_code == 401
    assert gateway.orchestrator.choices == []
    assert gateway.metric("baton_requests_total", outcome="invalid_api_key") == 1


async def test_without_a_key_configured_any_is_welcome() -> None:
    response = await Gateway().get("/v1/models", headers={"authorization": "Bearer any"})
    assert response.status_code == 200
