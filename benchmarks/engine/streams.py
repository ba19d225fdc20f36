"""Chat streams all at once, recorded with as little work as possible while they run.

The client shares the machine with the server that it measures, so it only notes when which bytes
came; what they say is read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from urllib.parse import urlsplit

import h11

from benchmarks.chat_stream import ChatStream, RequestFailed

_LONGEST_S = 300.0
_LEAST_TOLD = 0.8
"""Of an answer's tokens: a server that tells no token ids holds some back until they are text."""


@dataclass(slots=True)
class Recorder(asyncio.Protocol):
    """Sends ``request`` and keeps what comes, until the connection ends or ``close``."""

    request: bytes
    ended: asyncio.Future[None]
    began_at: float = 0.0
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    _transport: asyncio.Transport | None = None

    async def wait_ended(self) -> None:
        """Whoever gives up waiting gives up nothing else."""
        await asyncio.shield(self.ended)

    def close(self) -> None:
        """Leaves, whatever is still to come."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.began_at = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One whole answer. Times are seconds of ``time.perf_counter``."""

    began_at: float
    token_times: tuple[float, ...]
    """Of each token; of a server that tells no token ids, of those that have text."""
    num_prompt_tokens: int
    num_tokens: int

    @property
    def tokens_a_time(self) -> float:
        """1, and hardly more where tokens without text came with others."""
        return self.num_tokens / len(self.token_times)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.began_at


async def stream_all(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Streamed]:
    """Asks ``url``'s chat API for all of ``bodies`` at once. Raises RequestFailed, OSError."""
    recorders = [await record(url, body) for body in bodies]
    try:
        async with asyncio.timeout(_LONGEST_S):
            for recorder in recorders:
                await recorder.ended
    except TimeoutError:
        raise RequestFailed("timeout", f"no end after {_LONGEST_S:g} s") from None
    return [_read(recorder) for recorder in recorders]


async def record(url: str, body: Mapping[str, Any]) -> Recorder:
    """Asks, and returns once the request is sent: ``ended`` is for waiting. Raises OSError."""
    loop = asyncio.get_running_loop()
    recorder = Recorder(_request(url, body), loop.create_future())
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    await loop.create_connection(lambda: recorder, host, port)
    return recorder


def decode_step_ms(streams: Sequence[Streamed]) -> float:
    """Mean time between two tokens of a stream, while all of them decode."""
    begin = max(stream.token_times[0] for stream in streams)
    end = min(stream.token_times[-1] for stream in streams)
    gaps = [
        sum(begin < moment <= end for moment in stream.token_times) * stream.tokens_a_time
        for stream in streams
    ]
    if end <= begin or not min(gaps):
        raise ValueError("the streams hardly ran at once; ask for longer answers")
    return (end - begin) * 1000 * len(streams) / sum(gaps)


def _request(url: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {urlsplit(url).netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + data


def _read(recorder: Recorder) -> Streamed:
    """Raises RequestFailed for what is no whole answer."""
    stream = ChatStream(recorder.began_at)
    replay(recorder, stream)
    assert stream.ttft_s is not None
    first = recorder.began_at + stream.ttft_s
    return _streamed(stream, list(accumulate(stream.gaps_s, initial=first)))


def replay(recorder: Recorder, stream: ChatStream) -> None:
    """Pushes what was recorded into ``stream``, each read at its moment.

    Raises RequestFailed for what is no whole answer; the stream has what came of it.
    """
    data = b""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    try:
        for now, data in [*recorder.reads, (time.perf_counter(), b"")]:
            connection.receive_data(data)
            while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response) and event.status_code != 200:
                    raise RequestFailed("status", str(event.status_code))
                if isinstance(event, h11.Data):
                    stream.push(bytes(event.data), now)
                if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    return stream.end(now)
    except h11.RemoteProtocolError as error:
        raise RequestFailed("malformed" if data else "cut", str(error)) from None
    raise RequestFailed("cut", "the connection ended within the answer")


def _streamed(stream: ChatStream, times: Sequence[float]) -> Streamed:
    if not times or stream.num_prompt_tokens is None:
        raise RequestFailed("malformed", "the answer has no token, or no usage")
    if not _LEAST_TOLD * stream.num_tokens <= len(times) <= stream.num_tokens:
        detail = f"{len(times)} tokens came, {stream.num_tokens} are in the usage"
        raise RequestFailed("miscount", detail)
    return Streamed(stream.began_at, tuple(times), stream.num_prompt_tokens, stream.num_tokens)
