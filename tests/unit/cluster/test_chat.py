"""The terminal chat against a transport that answers in the server's place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InvalidRequestError, UnavailableError
from cluster.chat import Chat, ChatOptions, summary
from cluster.chat_stream import Answer, events, stream_chat
from cluster.server_client import server_url

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def sse(*payloads: Any, done: bool = True) -> str:
    text = "".join(f"data: {json.dumps(payload)}\n\n" for payload in payloads)
    return text + ("data: [DONE]\n\n" if done else "")


def piece(text: str | None, finish: str | None = None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 40,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 16},
    },
}

Answerer = Callable[[httpx.Request], httpx.Response]


def client_of(answer: Answerer) -> httpx.Client:
    return httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))


def read(text: str, status: int = 200) -> tuple[str, Answer]:
    answer = Answer(began=0.0)
    with client_of(lambda _: httpx.Response(status, text=text)) as client:
        return "".join(stream_chat(client, BODY, answer)), answer


def test_pieces_are_joined_and_usage_is_kept() -> None:
    text = ": keep-alive\n\n" + sse(
        piece(""), piece("Par"), piece("is"), piece(None, "stop"), USAGE
    )
    whole, answer = read(text)
    assert whole == answer.text == "Paris"
    assert (answer.num_tokens, answer.finish_reason) == (3, "stop")


def test_request_asks_for_a_stream_with_usage() -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, text=sse(piece("x")))

    with client_of(answer) as client:
        list(stream_chat(client, BODY, Answer(began=0.0)))
    assert seen == [{**BODY, "stream": True, "stream_options": {"include_usage": True}}]


def test_refusal_is_the_servers_own_sentence() -> None:
    body = json.dumps({"error": {"message": "no model named 'm'", "code": "model_not_found"}})
    with pytest.raises(UnavailableError, match="no model named 'm'"):
        read(body, 404)
    with pytest.raises(UnavailableError, match="answered 502: <html>"):
        read("<html>", 502)


def test_error_within_the_stream_is_raised_after_the_text_before_it() -> None:
    text = sse(piece("half"), {"error": {"message": "worker lost", "code": "worker_lost"}})
    answer = Answer(began=0.0)
    with (
        client_of(lambda _: httpx.Response(200, text=text)) as client,
        pytest.raises(UnavailableError, match="worker lost"),
    ):
        list(stream_chat(client, BODY, answer))
    assert answer.text == "half"


def test_stream_without_done_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="broke the answer off"):
        read(sse(piece("half"), done=False))


def test_server_that_is_gone_is_a_sentence() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client_of(answer) as client, pytest.raises(UnavailableError, match="no server answers"):
        list(stream_chat(client, BODY, Answer(began=0.0)))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20)), max_size=6))
def test_events_give_back_what_was_sent(payloads: list[dict[str, str]]) -> None:
    assert list(events(sse(*payloads).split("\n"))) == payloads


def test_event_over_several_data_lines_is_one() -> None:
    lines = ['data: {"a":', "data: 1}", "", "event: x", "data: [DONE]", ""]
    assert list(events(lines)) == [{"a": 1}]


def test_summary_shows_time_rate_and_cached_tokens() -> None:
    answer = Answer(10.0, "x", first_at=10.25, last_at=11.25, num_tokens=21)
    answer.usage = {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 16}}
    shown = summary(answer)
    assert "TTFT 250 ms" in shown
    assert "20.0 tokens/s" in shown
    assert "16 of 40 prompt tokens cached" in shown


def test_single_token_has_no_rate() -> None:
    assert Answer(0.0, first_at=1.0, last_at=1.0, num_tokens=1).tokens_per_s is None


class Server:
    """Remembers the conversations it was sent, and answers with their length."""

    def __init__(self) -> None:
        self.conversations: list[list[dict[str, str]]] = []
        self.fail = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.conversations.append(json.loads(request.content)["messages"])
        if self.fail:
            return httpx.Response(503, json={"error": {"message": "not ready"}})
        return httpx.Response(200, text=sse(piece(f"answer {len(self.conversations)}")))


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def chat(server: Server) -> Iterator[Chat]:
    with client_of(server) as client:
        yield Chat(client, ChatOptions("http://test", None, None, None, "be brief"), "m")


def test_second_question_carries_the_first_answer(chat: Chat, server: Server) -> None:
    chat.ask("one")
    chat.ask("two")
    assert server.conversations[1] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "two"},
    ]


def test_failed_question_is_forgotten(chat: Chat, server: Server) -> None:
    server.fail = True
    with pytest.raises(UnavailableError):
        chat.ask("one")
    server.fail = False
    chat.ask("two")
    assert [message["content"] for message in server.conversations[1]] == ["be brief", "two"]


def test_conversation_ends_with_exit_and_with_end_of_input(
    chat: Chat, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "", "/new", "again", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.converse()
    assert [len(messages) for messages in server.conversations] == [2, 2]

    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    chat.converse()


def test_error_does_not_end_the_conversation(
    chat: Chat, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail = True
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.converse()
    assert len(server.conversations) == 1


def test_question_that_is_no_text_is_refused_and_the_chat_goes_on() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["messages"][-1]["content"])
        return httpx.Response(200, text=sse(piece("yes", "stop"), USAGE))

    with client_of(answer) as client:
        chat = Chat(client, ChatOptions("http://test", "m", None, None, None), "m")
        with pytest.raises(InvalidRequestError, match="UTF-8"):
            chat.ask("h\udcff")
        chat.ask("hello")
    assert asked == ["hello"]


@pytest.mark.parametrize(
    "address", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"]
)
def test_address_for_api_clients_names_the_server_too(address: str) -> None:
    assert server_url(address) == "http://h:1"
