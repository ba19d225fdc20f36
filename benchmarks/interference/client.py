"""Streams that decode while long prompts arrive, over HTTP: what came when.

Each of the streams is answered at length, and asks something else as soon as an answer is over.
Prompts come at moments that were drawn before, however slow the answers are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks import prompts
from benchmarks.arrivals import Arrival, Phase, make_phase
from benchmarks.arrivals import Load as Arrivals
from benchmarks.chat_stream import ChatStream, RequestFailed
from benchmarks.engine.streams import Recorder, decode_step_ms, record, replay, stream_all

_SETTLED_READS = 8
"""After so many reads a stream decodes: its head, and some tokens."""
_ANSWERED = b"HTTP/1.1 200"
_BEGIN_S = 120.0
_LEAD_S = 0.5
_POLL_S = 0.05
_CHAT_WORDS = 48


@dataclass(frozen=True, slots=True)
class Load:
    """Times are seconds."""

    num_streams: int
    stream_tokens: int
    """Of each of their answers."""
    rate_per_s: float
    num_prompts: int
    prompt_tokens: int
    """Of a long prompt's text."""
    answer_tokens: int
    """Of the answer to a long prompt."""
    bound_s: float
    """A prompt that is not answered after so long is given up."""
    num_saturating: int
    """Streams at once for tokens/s."""
    saturating_tokens: int

    @property
    def window_s(self) -> float:
        return self.num_prompts / self.rate_per_s

    def phase(self, seed: str) -> Phase:
        """The long prompts, no two alike, and when they come."""
        load = Arrivals(1.0, self.prompt_tokens, self.answer_tokens, self.bound_s)
        return make_phase(seed, load, rate_per_s=self.rate_per_s, num_requests=self.num_prompts)


@dataclass(frozen=True, slots=True)
class Observed:
    """Times are those of ``time.perf_counter``."""

    began_at: float
    """When prompts could come; all streams decode by then."""
    ended_at: float
    """When all could have come and the last was answered or given up."""
    streams: list[ChatStream]
    """Also those that were left at the end."""
    prompts: list[ChatStream]
    """In order of arrival; their times count from the moment that was drawn."""
    num_overdue: int
    num_failed: int


class Client:
    """Asks one server. Raises RequestFailed where a stream is not answered, OSError."""

    def __init__(self, url: str, model: str, load: Load, seed: str) -> None:
        self._url = url
        self._model = model
        self._load = load
        self._seed = seed

    async def warm_up(self) -> None:
        """What only a server's first requests cost."""
        random = prompts.rng(self._seed, "warm-up")
        texts = (_chat(random), prompts.document_opening(random, self._load.prompt_tokens))
        for text in texts:
            await stream_all(self._url, [self._body(text, self._load.answer_tokens)])

    async def step_ms(self) -> float:
        """Between two tokens of a stream, while ``num_saturating`` decode and no prompt comes."""
        random = prompts.rng(self._seed, "saturating")
        tokens = self._load.saturating_tokens
        bodies = [self._body(_chat(random), tokens) for _ in range(self._load.num_saturating)]
        return decode_step_ms(await stream_all(self._url, bodies))

    async def interfere(self) -> Observed:
        async with self._streams() as recorders:
            await self._wait_decoding(recorders)
            phase = self._load.phase(self._seed)
            began_at = time.perf_counter() + _LEAD_S
            arrived = await asyncio.gather(
                *(self._arrive(arrival, began_at) for arrival in phase.arrivals)
            )
            ended_at = max(time.perf_counter(), began_at + phase.window_s)
            await _sleep_until(ended_at)
            answered = [recorder.ended.done() for recorder in recorders]
        return Observed(
            began_at,
            ended_at,
            [
                _stream(recorder, answered=each)
                for recorder, each in zip(recorders, answered, strict=True)
            ],
            [stream for stream, _ in arrived],
            num_overdue=sum(outcome == "overdue" for _, outcome in arrived),
            num_failed=sum(outcome == "failed" for _, outcome in arrived),
        )

    @asynccontextmanager
    async def _streams(self) -> AsyncIterator[list[Recorder]]:
        """Recorders of all answers so far; within the block there are more and more. What is
        left at its end is cut off; where a stream fails, so is the block."""
        recorders: list[Recorder] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._stream_on(number, recorders))
                    for number in range(self._load.num_streams)
                ]
                yield recorders
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            for recorder in recorders:
                recorder.close()

    async def _stream_on(self, number: int, recorders: list[Recorder]) -> None:
        """One answer after the other. Raises RequestFailed for one that never began, OSError."""
        random = prompts.rng(self._seed, "stream", number)
        while True:
            body = self._body(_chat(random), self._load.stream_tokens)
            recorder = await record(self._url, body)
            recorders.append(recorder)
            await recorder.wait_ended()
            if not recorder.reads or not recorder.reads[0][1].startswith(_ANSWERED):
                raise RequestFailed("status", f"a stream was refused: {recorder.reads[:1]}")

    async def _wait_decoding(self, recorders: list[Recorder]) -> None:
        ends_at = time.perf_counter() + _BEGIN_S
        while sum(len(each.reads) > _SETTLED_READS for each in recorders) < self._load.num_streams:
            if time.perf_counter() > ends_at:
                raise RequestFailed("timeout", f"no streams after {_BEGIN_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def _arrive(self, arrival: Arrival, began_at: float) -> tuple[ChatStream, str]:
        """Its answer, and what became of it."""
        due_at = began_at + arrival.at_s
        await _sleep_until(due_at)
        text = arrival.messages[0]["content"]
        recorder = await record(self._url, self._body(text, self._load.answer_tokens))
        outcome = "whole"
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._load.bound_s):
                await recorder.wait_ended()
        except TimeoutError:
            recorder.close()
            outcome = "overdue"
        stream = ChatStream(due_at)
        try:
            replay(recorder, stream)
        except RequestFailed:
            outcome = "failed" if outcome == "whole" else outcome
        return stream, outcome

    def _body(self, text: str, num_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


def _stream(recorder: Recorder, *, answered: bool) -> ChatStream:
    """As far as it came; one that was ``answered`` has to be whole. Raises RequestFailed."""
    stream = ChatStream(recorder.began_at)
    try:
        replay(recorder, stream)
    except RequestFailed as failure:
        if answered or failure.kind != "cut":
            raise
    return stream


def _chat(random: Random) -> str:
    return prompts.document(random, _CHAT_WORDS)


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.perf_counter()))
