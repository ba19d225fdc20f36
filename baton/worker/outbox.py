"""What the engine thread has to say, collected over a step and sent at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.errors import BatonError
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2 as pb
from baton.worker.inbox import Inbox
from baton.worker.session_server import StepEvents, StreamKey


@dataclass(frozen=True, slots=True)
class Load:
    """How a worker stands between two steps."""

    num_steps: int = 0
    num_waiting: int = 0
    num_running: int = 0
    num_waiting_tokens: int = 0
    free: int = 0
    cached: int = 0
    referenced: int = 0
    quarantined: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """A load, and what it includes."""

    load: Load = Load()
    taken_at: float = 0.0
    num_opens: Mapping[int, int] = field(default_factory=dict)
    """Of each Session, the Opens that the engine thread had taken up."""


@dataclass(frozen=True, slots=True)
class InputUse:
    """Where the KV of a sequence's input tokens came from; sums to their number."""

    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_received_tokens: int = 0


class Outbox:
    """Used by the engine thread only, but for ``standing``; ``deliver`` runs on the event
    loop."""

    def __init__(
        self,
        inbox: Inbox,
        metrics: WorkerMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inbox = inbox
        self._metrics = metrics
        self._events = StepEvents()
        self.deliver: Callable[[StepEvents], None] = lambda events: None
        self.clock = clock
        self.standing = Standing(taken_at=clock())
        """Replaced as a whole, so that any thread may read it."""
        self._num_opens = Counter[int]()

    def opened(self, key: StreamKey) -> None:
        """Counts an Open that is taken up; the loads set from here on include it."""
        self._num_opens[key.session] += 1

    def session_lost(self, session: int) -> None:
        del self._num_opens[session]

    def reserved(self, key: StreamKey, num_held_tokens: int) -> None:
        self._events.reserved.append((key, num_held_tokens))

    def token(
        self,
        key: StreamKey,
        position: int,
        token_id: int,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        if logprobs is not None:
            self._events.logprobs[len(self._events.tokens)] = logprobs
        self._events.tokens.append((key, position, token_id))

    def closed(
        self,
        key: StreamKey,
        reason: pb.CloseReason.ValueType,
        use: InputUse = InputUse(),
        error: BatonError | None = None,
    ) -> None:
        message = pb.Closed(
            reason=reason,
            error_code=error.code if error else "",
            error_message=error.message if error else "",
            num_cached_tokens=use.num_cached_tokens,
            num_computed_tokens=use.num_computed_tokens,
            num_received_tokens=use.num_received_tokens,
        )
        self._events.closed.append((key, message))

    def failed(self, key: StreamKey, error: BatonError) -> None:
        self.closed(key, pb.CLOSE_REASON_FAILED, error=error)

    def refused(self, key: StreamKey, error: BatonError) -> None:
        """Answers an Open that never becomes work."""
        self.opened(key)
        self.failed(key, error)

    def count_input(self, use: InputUse) -> None:
        """Counts one sequence's input tokens by source."""
        self._metrics.prompt_tokens["cached"].inc(use.num_cached_tokens)
        self._metrics.prompt_tokens["computed"].inc(use.num_computed_tokens)
        self._metrics.prompt_tokens["received"].inc(use.num_received_tokens)

    def cache_changed(self, changes: dict[bytes, bool]) -> None:
        """Block hashes, and whether the prefix cache holds each now."""
        self._events.cache.update(changes)

    def flush(self) -> None:
        """Sends what has been collected to the event loop, in one call."""
        if self._events:
            self._inbox.call(self.deliver, self._events)
            self._events = StepEvents()

    def set_load(self, load: Load) -> None:
        """Publishes how the worker stands, to its metrics and its reports."""
        before = self.standing.load
        self.standing = Standing(load, self.clock(), dict(self._num_opens))
        if load == before:
            return
        metrics = self._metrics
        for state, gauge in metrics.kv_blocks.items():
            gauge.set(getattr(load, state))
        metrics.running.set(load.num_running)
        metrics.waiting.set(load.num_waiting)
