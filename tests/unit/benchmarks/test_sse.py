"""Server-sent events, however the network cuts them up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sse import SseEvent, SseReader

STREAM = (
    ": keep-alive\n\n"
    'data: {"a": "é🙂"}\n\n'
    "event: error\r\ndata: bad\r\n\r\n"
    "data: one\ndata:two\nid: 7\n\n"
    "\n"
    "data: [DONE]\n\n"
).encode()
EVENTS = [
    SseEvent("message", '{"a": "é🙂"}'),
    SseEvent("error", "bad"),
    SseEvent("message", "one\ntwo"),
    SseEvent("message", "[DONE]"),
]


def test_several_events_of_one_read_are_told_apart() -> None:
    assert SseReader().push(STREAM) == EVENTS


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_events_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    reader = SseReader()
    found: list[SseEvent] = []
    for begin, end in zip([0, *cuts], [*cuts, len(STREAM)], strict=True):
        found += reader.push(STREAM[begin:end])
    assert found == EVENTS


def test_an_event_without_its_empty_line_is_not_there_yet() -> None:
    reader = SseReader()
    assert reader.push(b"data: half\n") == []
    assert reader.push(b"\n") == [SseEvent("message", "half")]


def test_the_type_of_an_event_does_not_outlive_it() -> None:
    first, second = SseReader().push(b"event: error\ndata: a\n\ndata: b\n\n")
    assert (first.type, second.type) == ("error", "message")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        SseReader().push(b"data: \xff\n\n")
