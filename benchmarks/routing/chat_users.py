"""The users of a trace, chatting with a real server over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from benchmarks.routing.oracle import Asked
from benchmarks.routing.trace import Chat, Message

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One request and what came of it."""

    user: int
    turn: int
    sent_at: float
    """Seconds since the replay began."""
    ttft_s: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str
    num_cached: int
    """``usage.prompt_tokens_details.cached_tokens``."""

    @property
    def asked(self) -> Asked:
        return Asked(self.prompt, self.answer)


async def replay(
    url: str, model: str, chats: Sequence[Chat], *, time_scale: float = 1.0
) -> list[Answered]:
    """Every request in the order of sending; greedy. ``time_scale`` stretches think times.

    Raises httpx.HTTPError, and ValueError for an answer that is none.
    """
    began = time.monotonic()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:

        async def chat(one: Chat) -> list[Answered]:
            messages = [{"role": "system", "content": one.system}]
            answered: list[Answered] = []
            for number, message in enumerate(one.turns):
                await asyncio.sleep(message.think_s * time_scale)
                messages.append({"role": "user", "content": message.text})
                sent_at = time.monotonic() - began
                got = await _ask(client, model, messages, message)
                answered.append(Answered(one.user, number, sent_at, *got))
                messages.append({"role": "assistant", "content": answered[-1].text})
            return answered

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chat(one)) for one in chats]
    return sorted((each for task in tasks for each in task.result()), key=lambda a: a.sent_at)


async def _ask(
    client: httpx.AsyncClient, model: str, messages: Sequence[dict[str, str]], message: Message
) -> tuple[float, tuple[int, ...], tuple[int, ...], str, int]:
    """Seconds to the first token, prompt, answer, its text, cached tokens."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": message.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    began, ttft_s = time.monotonic(), None
    prompt, answer, text, usage = list[int](), list[int](), "", None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(f"the server gave an answer up: {chunk['error']}")
            prompt = chunk.get("prompt_token_ids") or prompt
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if choice.get("token_ids") and ttft_s is None:
                    ttft_s = time.monotonic() - began
                answer += choice.get("token_ids") or []
                text += choice["delta"].get("content") or ""
    if ttft_s is None or usage is None:
        raise ValueError("the server's answer has no token or no usage")
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    return ttft_s, tuple(prompt), tuple(answer), text, num_cached
