"""The interference experiment's client, against a server that says what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from benchmarks.chat_stream import RequestFailed
from benchmarks.interference.client import Client, Load, Observed

LOAD = Load(
    num_streams=2,
    stream_tokens=30,
    rate_per_s=10.0,
    num_prompts=4,
    prompt_tokens=400,
    answer_tokens=2,
    bound_s=5.0,
    num_saturating=3,
    saturating_tokens=20,
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Server:
    """Streams tokens; what is asked with ``answer_tokens`` is a long prompt."""

    gap_s: float = 0.005
    prefill_s: float = 0.0
    prompts_fail: bool = False
    streams_fail: bool = False
    streams_break: bool = False
    asked: list[dict] = field(default_factory=list)
    answers: set[asyncio.Task] = field(default_factory=set)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.answers.add(asyncio.create_task(self._answer(reader, writer)))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append(body)
        is_prompt = body["max_tokens"] == LOAD.answer_tokens
        try:
            if self.prompts_fail if is_prompt else self.streams_fail:
                writer.write(BUSY)
            else:
                await self._stream(writer, body["max_tokens"], is_prompt=is_prompt)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _stream(
        self, writer: asyncio.StreamWriter, num_tokens: int, *, is_prompt: bool
    ) -> None:
        writer.write(HEAD)
        if is_prompt:
            await asyncio.sleep(self.prefill_s)
        for number in range(num_tokens):
            last = number == num_tokens - 1
            if last and self.streams_break and not is_prompt:
                return
            choice = {"delta": {"content": "a"}, "token_ids": [1]}
            event(writer, {"choices": [{**choice, "finish_reason": "length" if last else None}]})
            await writer.drain()
            await asyncio.sleep(self.gap_s)
        usage = {"prompt_tokens": 430, "completion_tokens": num_tokens}
        event(writer, {"choices": [], "usage": usage})
        event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


def event(writer: asyncio.StreamWriter, data: object) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    line = f"data: {text}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(line), line))


@asynccontextmanager
async def asking(server: Server, load: Load = LOAD) -> AsyncIterator[Client]:
    listening = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        yield Client(f"http://127.0.0.1:{port}", "a-model", load, "seed")
    await asyncio.gather(*server.answers)


async def observed_of(server: Server, load: Load = LOAD) -> Observed:
    async with asking(server, load) as client:
        return await client.interfere()


async def test_streams_go_on_with_another_chat_while_prompts_come() -> None:
    server = Server()
    observed = await observed_of(server)
    long = [body for body in server.asked if body["max_tokens"] == LOAD.answer_tokens]
    chats = [body for body in server.asked if body["max_tokens"] == LOAD.stream_tokens]
    texts = {body["messages"][0]["content"] for body in server.asked}
    assert len(long) == LOAD.num_prompts
    assert len(chats) > LOAD.num_streams, "an answer of 30 tokens is over before the window is"
    assert len(texts) == len(server.asked), "no two are alike"
    assert len(observed.streams) == len(chats)
    assert (observed.num_failed, observed.num_overdue) == (0, 0)
    assert [prompt.num_prompt_tokens for prompt in observed.prompts] == [430] * LOAD.num_prompts


async def test_the_window_lasts_until_the_last_prompt_is_answered() -> None:
    observed = await observed_of(Server(prefill_s=0.5))
    last = max(p.began_at + (p.e2e_s or 0.0) for p in observed.prompts)
    assert observed.ended_at >= last
    assert all((prompt.ttft_s or 0.0) >= 0.5 for prompt in observed.prompts)


async def test_a_prompt_that_is_not_answered_in_time_is_overdue() -> None:
    load = Load(2, 30, 10.0, 4, 400, 2, 0.2, 3, 20)
    observed = await observed_of(Server(prefill_s=2.0), load)
    assert (observed.num_overdue, observed.num_failed) == (4, 0)
    assert all(prompt.ttft_s is None for prompt in observed.prompts)


async def test_a_refused_prompt_is_counted_as_failed() -> None:
    observed = await observed_of(Server(prompts_fail=True))
    assert (observed.num_overdue, observed.num_failed) == (0, LOAD.num_prompts)


async def test_refused_streams_end_the_experiment() -> None:
    with pytest.raises(RequestFailed, match="503"):
        await observed_of(Server(streams_fail=True))


async def test_a_stream_that_breaks_off_by_itself_ends_the_experiment() -> None:
    with pytest.raises(RequestFailed, match=r"^cut: peer closed"):
        await observed_of(Server(streams_break=True))


async def test_a_step_is_that_of_so_many_streams_at_once() -> None:
    server = Server(gap_s=0.02)
    async with asking(server) as client:
        step_ms = await client.step_ms()
    assert [body["max_tokens"] for body in server.asked] == [20, 20, 20]
    assert step_ms >= 20.0
