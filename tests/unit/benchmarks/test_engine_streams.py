"""Streams that are recorded and read afterwards: times, steps, and what is no whole answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.chat_stream import RequestFailed
from benchmarks.engine.streams import Streamed, decode_step_ms, stream_all

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PAUSE_S = 0.05


def event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    line = f"data: {text}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(line), line)


def token(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"delta": {"content": text}, "finish_reason": finish}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
END = b"0\r\n\r\n"
WHOLE = [
    HEAD,
    token("a"),
    token("b"),
    token("c", "length") + USAGE + event("[DONE]") + END,
]


@asynccontextmanager
async def serving(pieces: list[bytes]) -> AsyncIterator[str]:
    """Answers every connection with ``pieces``, pausing before each, and closes it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            await asyncio.sleep(PAUSE_S)
            writer.write(piece)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_tokens_have_the_times_at_which_they_came() -> None:
    async with serving(WHOLE) as url:
        streams = await stream_all(url, [{"n": 1}, {"n": 2}])
    assert len(streams) == 2
    for stream in streams:
        assert (stream.num_prompt_tokens, stream.num_tokens) == (7, 3)
        first, second, third = stream.token_times
        assert stream.ttft_s >= 2 * PAUSE_S * 0.9
        assert second - first >= PAUSE_S * 0.5
        assert third - second >= PAUSE_S * 0.5


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([*WHOLE[:-1]], "cut"),
        ([HEAD, token("a"), END], "cut"),
        ([HEAD, token("c", "length"), END], "cut"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"], "status"),
        ([HEAD, event({"error": {"code": "x", "message": "lost"}})], "error event"),
        ([b"nonsense\r\n\r\n"], "malformed"),
    ],
)
async def test_what_is_no_whole_answer_is_none(pieces: list[bytes], kind: str) -> None:
    async with serving(pieces) as url:
        with pytest.raises(RequestFailed) as raised:
            await stream_all(url, [{}])
    assert raised.value.kind == kind


def test_a_step_is_timed_while_all_streams_decode() -> None:
    early = Streamed(0.0, tuple(0.1 * n for n in range(1, 11)), 5, 10)
    late = Streamed(0.0, tuple(0.5 + 0.1 * n for n in range(11)), 5, 11)
    # Between 0.5, when the later begins, and 1.0, when the earlier ends: 5 tokens of each.
    assert decode_step_ms([early, late]) == pytest.approx(100.0)


def test_streams_that_did_not_overlap_have_no_step() -> None:
    with pytest.raises(ValueError, match="longer answers"):
        decode_step_ms([Streamed(0, (1.0, 2.0), 5, 2), Streamed(0, (3.0, 4.0), 5, 2)])


def test_tokens_that_a_server_holds_back_until_they_are_text_count_too() -> None:
    # Ten tokens in eight times: the others came with one that has text.
    held = Streamed(0.0, tuple(0.1 * n for n in range(1, 9)), 5, 10)
    assert decode_step_ms([held]) == pytest.approx(100.0 * 8 / 10)


@pytest.mark.parametrize(("num_told", "whole"), [(2, False), (4, True), (5, True), (6, False)])
async def test_an_answer_with_far_fewer_or_more_tokens_than_told_is_none(
    num_told: int, whole: bool
) -> None:
    usage = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
    pieces = [HEAD, *[token("a")] * (num_told - 1), token("b", "length") + usage]
    async with serving([*pieces, event("[DONE]") + END]) as url:
        if whole:
            (stream,) = await stream_all(url, [{}])
            assert len(stream.token_times) == num_told
        else:
            with pytest.raises(RequestFailed, match="miscount"):
                await stream_all(url, [{}])
