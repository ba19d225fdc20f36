"""One request over HTTP: what is posted, and which failure is which."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from benchmarks.chat_client import ServedModel, ask, new_client, served_model
from benchmarks.chat_stream import ChatStream, RequestFailed

WHOLE = (
    b'data: {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)
STREAMS = {"content-type": "text/event-stream; charset=utf-8"}


class Portions(httpx.SyncByteStream):
    """A body that comes in portions; an exception among them is raised."""

    def __init__(self, *portions: bytes | Exception) -> None:
        self._portions = portions

    def __iter__(self) -> Iterator[bytes]:
        for portion in self._portions:
            if isinstance(portion, Exception):
                raise portion
            yield portion


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")


def failure_of(response: httpx.Response | Exception, **options: float) -> RequestFailed:
    def answer(_: httpx.Request) -> httpx.Response:
        if isinstance(response, Exception):
            raise response
        return response

    with pytest.raises(RequestFailed) as caught:
        ask(client_of(answer), {}, ChatStream(0.0), timeout_s=10.0, clock=lambda: 1.0)
    return caught.value


def test_a_whole_answer_is_asked_for_and_read() -> None:
    posted = []

    def answer(request: httpx.Request) -> httpx.Response:
        posted.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, headers=STREAMS, stream=Portions(WHOLE[:30], WHOLE[30:]))

    stream, ticks = ChatStream(0.0), iter((1.0, 2.0, 3.0))
    ask(client_of(answer), {"max_tokens": 5}, stream, timeout_s=10.0, clock=lambda: next(ticks))
    assert (stream.ttft_s, stream.e2e_s, stream.text) == (2.0, 3.0, "x")
    assert posted == [
        (
            "/v1/chat/completions",
            {"max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
        )
    ]


@pytest.mark.parametrize(
    ("response", "kind", "words"),
    [
        (httpx.ConnectError("refused"), "connect", "refused"),
        (httpx.ReadTimeout(""), "timeout", "ReadTimeout"),
        (
            httpx.Response(429, json={"error": {"code": "overloaded", "message": "full"}}),
            "status",
            "429 overloaded: full",
        ),
        (httpx.Response(502, text="Bad  Gateway"), "status", "502 Bad Gateway"),
        (httpx.Response(200, json={"choices": []}), "no stream", "application/json"),
        (
            httpx.Response(
                200,
                headers=STREAMS,
                stream=Portions(WHOLE[:30], httpx.RemoteProtocolError("peer closed connection")),
            ),
            "cut",
            "peer closed",
        ),
        (httpx.Response(200, headers=STREAMS, stream=Portions(WHOLE[:-14])), "cut", "[DONE]"),
    ],
)
def test_failures_are_told_apart(
    response: httpx.Response | Exception, kind: str, words: str
) -> None:
    failure = failure_of(response)
    assert failure.kind == kind
    assert words in str(failure)


def test_a_stream_of_keep_alives_is_not_waited_for_for_ever() -> None:
    stream, ticks = ChatStream(0.0), iter((5.0, 9.0, 11.0))
    body = Portions(*[b": keep-alive\n\n"] * 9)
    client = client_of(lambda _: httpx.Response(200, headers=STREAMS, stream=body))
    with pytest.raises(RequestFailed, match="no end after 10 s"):
        ask(client, {}, stream, timeout_s=10.0, clock=lambda: next(ticks))


def test_a_failure_says_no_more_than_fits_a_table() -> None:
    assert len(str(failure_of(httpx.Response(500, text="x" * 5000)))) < 250


def test_the_first_model_and_its_context_are_found() -> None:
    data = {"data": [{"id": "m", "max_model_len": 2048}, {"id": "n"}]}
    client = client_of(lambda _: httpx.Response(200, json=data))
    assert served_model(client) == ServedModel("m", 2048)


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{}]}, [], {"data": ["m"]}])
def test_a_server_of_something_else_is_recognised(answer: object) -> None:
    client = client_of(lambda _: httpx.Response(200, json=answer))
    with pytest.raises(RequestFailed, match="no list of models"):
        served_model(client)


@pytest.mark.parametrize("url", ["http://host:1", "http://host:1/", "http://host:1/v1"])
def test_an_address_may_end_as_api_clients_want_it(url: str) -> None:
    with new_client(url, api_key="KEY", timeout_s=1.0) as client:
        request = client.build_request("GET", "/v1/models")
    assert str(request.url) == "http://host:1/v1/models"
    assert request.headers["authorization"] == "Bearer KEY"
