"""A worker's loop around a pretended model, with the hand-off recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from support.sequences import pretend_step

from baton.faults import Faults
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2 as pb
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.session_server import StepEvents, StreamKey
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sampled, Scheduled


class PretendEngine:
    """Keeps sequences' books as the engine does; every token it samples is ``token_id``."""

    def __init__(self, kv: KvCache, token_id: int = 7) -> None:
        self.kv = kv
        self.token_id = token_id
        self.logprobs: TokenLogprobs | None = None
        """Those of every token that it samples."""
        self.on_step: Callable[[], None] = lambda: None
        """Called when a step begins."""

    def step(self, chunks: Items[Scheduled]) -> list[Sampled]:
        self.on_step()
        done = pretend_step(self.kv, chunks, self.token_id)
        return [Sampled(seq, self.token_id, self.logprobs) for seq in done]


class Recorder:
    """Stands for KvSender or KvReceiver: every call is kept as (method, args, kwargs)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, method: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> None:
            self.calls.append((method, args, kwargs))

        return record

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """What both pools' worker tests need around the worker."""

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry, worker_id="w", role=role)
        self.inbox = Inbox(asyncio.get_running_loop())
        self.clock = Clock()
        self.outbox = Outbox(self.inbox, self.metrics, clock=self.clock)
        self.outbox.deliver = self._deliver
        self.faults = Faults(Path("/nonexistent"), "w")
        self.reserved: list[tuple[StreamKey, int]] = []
        self.tokens: list[tuple[StreamKey, int, int]] = []
        self.logprobs: dict[int, TokenLogprobs] = {}
        """By index in ``tokens``."""
        self.closed: dict[StreamKey, pb.Closed] = {}
        self.cache: dict[bytes, bool] = {}

    def _deliver(self, events: StepEvents) -> None:
        self.reserved += events.reserved
        first = len(self.tokens)
        self.logprobs |= {first + index: each for index, each in events.logprobs.items()}
        self.tokens += events.tokens
        self.cache |= events.cache
        for key, message in events.closed:
            assert key not in self.closed, f"{key} was closed twice"
            self.closed[key] = message

    @property
    def has_unsent(self) -> bool:
        """The worker has something to say that has not left the engine thread."""
        return bool(self.outbox._events)

    async def settle(self) -> None:
        """Lets everything that was sent to the event loop happen."""
        for _ in range(3):
            await asyncio.sleep(0)

    def counted(self, source: str) -> float:
        labels = {"worker": "w", "role": self._role(), "source": source}
        return self.registry.get_sample_value("baton_prompt_tokens_total", labels) or 0.0

    def _role(self) -> str:
        for family in self.registry.collect():
            for sample in family.samples:
                if "role" in sample.labels:
                    return sample.labels["role"]
        raise AssertionError("no series has a role")
