"""What a streamed answer's bytes and their times come to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.chat_stream import ChatStream, RequestFailed
from benchmarks.figures import record_of


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def chunk(text: str = "", *, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason, **more}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": counts})


DONE = event(b"[DONE]")


def stream_of(*reads: tuple[float, bytes], began_at: float = 100.0) -> ChatStream:
    """Reads at seconds since the request began; the stream is not ended."""
    stream = ChatStream(began_at)
    for at_s, data in reads:
        stream.push(data, began_at + at_s)
    return stream


def failure_of(*reads: tuple[float, bytes]) -> RequestFailed:
    with pytest.raises(RequestFailed) as caught:
        stream_of(*reads).end(200.0)
    return caught.value


def test_times_are_those_of_the_reads() -> None:
    stream = stream_of(
        (0.5, chunk("He")), (0.75, chunk("llo")), (1.0, chunk("!", reason="stop")), (1.25, DONE)
    )
    stream.end(101.25)
    assert stream.ttft_s == 0.5
    assert stream.gaps_s == [0.25, 0.25]
    assert stream.e2e_s == 1.25
    assert (stream.text, stream.num_tokens, stream.counted_by) == ("Hello!", 3, "events")


def test_tokens_of_one_read_came_at_once_and_hide_no_pause() -> None:
    stream = stream_of((0.5, chunk("a")), (2.5, chunk("b") + chunk("c") + chunk("d")))
    assert stream.gaps_s == [2.0, 0.0, 0.0]


def test_an_event_of_several_tokens_counts_them_all() -> None:
    stream = stream_of(
        (0.5, chunk("", token_ids=[])),
        (1.0, chunk("ab", token_ids=[5, 6])),
        (3.0, chunk("c", token_ids=[7, 8, 9])),
    )
    assert stream.ttft_s == 1.0
    assert stream.gaps_s == [0.0, 2.0, 0.0, 0.0]
    assert (stream.num_tokens, stream.counted_by) == (5, "token ids")


def test_a_token_without_text_is_timed_by_its_id() -> None:
    stream = stream_of((0.5, chunk("", token_ids=[5])), (1.0, chunk("é", token_ids=[6])))
    assert (stream.ttft_s, stream.gaps_s) == (0.5, [0.5])


def test_the_role_alone_is_no_token() -> None:
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    stream = stream_of((0.25, role), (1.0, chunk("x")))
    assert (stream.ttft_s, stream.num_tokens) == (1.0, 1)


def test_usage_is_believed_before_events() -> None:
    stream = stream_of(
        (0.5, chunk("all at once", reason="length")), (0.5, usage(40, 12, 16) + DONE)
    )
    stream.end(101.0)
    assert (stream.num_tokens, stream.counted_by) == (12, "usage")
    assert (stream.num_prompt_tokens, stream.num_cached_tokens) == (40, 16)


def test_an_answer_without_text_has_its_first_token_at_its_end() -> None:
    stream = stream_of((0.75, chunk(reason="stop")), (1.0, usage(9, 1) + DONE))
    stream.end(101.0)
    assert (stream.ttft_s, stream.gaps_s, stream.num_tokens) == (0.75, [], 1)


@pytest.mark.parametrize(
    ("reads", "kind", "words"),
    [
        ((chunk("a"),), "cut", "without finish_reason"),
        ((chunk("a"), DONE), "cut", "without finish_reason"),
        ((chunk("a", reason="stop"),), "cut", "without [DONE]"),
        ((), "cut", "without finish_reason"),
        ((chunk("a", reason="abort"), DONE), "cut", "'abort'"),
        (
            (chunk("a"), event({"error": {"code": "worker_lost", "message": "gone"}})),
            "error event",
            "worker_lost: gone",
        ),
        ((b"event: error\ndata: {}\n\n",), "error event", "None"),
        ((event(b"{nope"),), "malformed", "no JSON"),
        ((event([1]),), "malformed", "no JSON object"),
        ((event({"object": "x"}),), "malformed", "no chat completion chunk"),
        ((event({"choices": ["x"]}),), "malformed", "no chat completion chunk"),
        ((b"data: \xff\n\n",), "malformed", "no UTF-8"),
        (
            (chunk("a", reason="stop", token_ids=[1, 2]), usage(3, 3), DONE),
            "miscount",
            "usage.completion_tokens",
        ),
    ],
)
def test_what_is_not_a_whole_answer_fails(reads: tuple[bytes, ...], kind: str, words: str) -> None:
    failure = failure_of(*((0.5, data) for data in reads))
    assert failure.kind == kind
    assert words in str(failure)


def test_a_failure_after_tokens_leaves_no_success_behind() -> None:
    stream = stream_of((0.5, chunk("a")), (1.0, chunk("b")))
    with pytest.raises(RequestFailed) as caught:
        stream.end(102.0)
    record = record_of(stream, "chat", run_began_at=90.0, now=102.0, failure=caught.value)
    assert record.outcome == "failed"
    assert record.failure_kind == "cut"
    assert (record.began_at_s, record.e2e_s, record.num_tokens) == (10.0, 2.0, 2)
