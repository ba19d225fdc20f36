"""One replay of a trace against a server that is up, and what it did to the workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.metrics_page import MetricsPage
from benchmarks.routing.chat_users import Answered, replay
from benchmarks.routing.trace import Chat
from benchmarks.routing.truth import Follower, WorkerBlocks, at_rest

_REST_S = 60.0
_STILL_S = 1.5
"""Workers report twice a second what was true after their last step."""
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Run:
    """What one policy made of a trace."""

    answered: Sequence[Answered]
    blocks: Mapping[str, WorkerBlocks]
    """By worker id, at rest."""
    num_handoff_bytes: int
    input_tokens: Mapping[str, int]
    """By worker id: those of all inputs that it took, whatever their KV came from."""
    num_computed: int
    """Input tokens that workers computed, by their own count."""
    num_preemptions: int
    duration_s: float

    @property
    def num_cached(self) -> int:
        return sum(each.num_cached for each in self.answered)

    @property
    def num_not_computed(self) -> int:
        """What ``num_cached`` is to say, by the workers' count; where a choice was not
        recovered, the two are equal."""
        return sum(len(each.prompt) for each in self.answered) - self.num_computed

    @property
    def answers(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Token ids by user and turn."""
        return {(each.user, each.turn): each.answer for each in self.answered}

    @property
    def index_is_true(self) -> bool:
        return all(blocks.agree for blocks in self.blocks.values())


async def run_trace(url: str, chats: Sequence[Chat], *, secret: str, time_scale: float) -> Run:
    """The server at ``url``, which was started with that BATON_SECRET, has answered nothing yet."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        workers = (await client.get("/status")).json()["workers"]
        async with Follower(workers, secret=secret, name="follower") as follower:
            began = time.monotonic()
            answered = await replay(url, model, chats, time_scale=time_scale)
            duration_s = time.monotonic() - began
            status = await _wait_rest(client)
            blocks = await at_rest(follower, status, secret=secret)
        page = MetricsPage((await client.get("/metrics")).text)

    def total(name: str, **labels: str) -> int:
        return int(page.metric(name, **labels))

    ids = [worker["worker_id"] for worker in workers]
    return Run(
        answered=answered,
        blocks=blocks,
        num_handoff_bytes=total("baton_kv_handoff_bytes_total", direction="received"),
        input_tokens={name: total("baton_prompt_tokens_total", worker=name) for name in ids},
        num_computed=total("baton_prompt_tokens_total", source="computed"),
        num_preemptions=total("baton_preemptions_total"),
        duration_s=duration_s,
    )


async def _wait_rest(client: httpx.AsyncClient) -> dict[str, Any]:
    """The status once no worker has had anything to do for a while. Raises TimeoutError."""
    busy = ("num_running", "num_waiting", "num_referenced_blocks", "num_quarantined_blocks")
    still_since = None
    async with asyncio.timeout(_REST_S):
        while True:
            status: dict[str, Any] = (await client.get("/status")).json()
            now = time.monotonic()
            if any(worker[name] for worker in status["workers"] for name in busy):
                still_since = None
            elif still_since is None:
                still_since = now
            elif now - still_since > _STILL_S:
                return status
            await asyncio.sleep(_POLL_S)
