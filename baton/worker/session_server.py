"""A worker's end of the Session: one stream per gateway, many requests on it.

Everything here runs on the event loop. The worker's loop thread hands over one
``StepEvents`` a step; it leaves as one message per gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio

from baton.config import SessionConfig
from baton.logprobs import TokenLogprobs
from baton.protocol import PROTOCOL_VERSION
from baton.v1 import session_pb2 as pb
from baton.v1 import session_pb2_grpc
from baton.worker.cache_feed import CacheFeed

logger = logging.getLogger(__name__)

MAX_PENDING_MESSAGES = 10_000
"""Unsent messages after which a gateway that does not read is given up."""


@dataclass(frozen=True, slots=True)
class StreamKey:
    """Names one attempt of one choice on one gateway's Session."""

    session: int
    stream_id: int


@dataclass(slots=True)
class StepEvents:
    """What a step has to tell the gateways."""

    reserved: list[tuple[StreamKey, int]] = field(default_factory=list)
    """(stream, tokens held already)"""
    tokens: list[tuple[StreamKey, int, int]] = field(default_factory=list)
    """(stream, position, token id)"""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By index in ``tokens``, of those whose streams want them."""
    closed: list[tuple[StreamKey, pb.Closed]] = field(default_factory=list)
    cache: dict[bytes, bool] = field(default_factory=dict)
    """Block hashes, and whether the prefix cache holds each now."""

    def __bool__(self) -> bool:
        return bool(self.reserved or self.tokens or self.closed or self.cache)


class SessionHandler(Protocol):
    """What a pool's service does with a gateway's messages."""

    def on_open(self, key: StreamKey, message: pb.Open) -> None: ...

    def on_proceed(self, key: StreamKey, num_held_tokens: int) -> None: ...

    def on_cancel(self, key: StreamKey) -> None: ...

    def on_session_lost(self, session: int) -> None: ...


class SessionServer(session_pb2_grpc.WorkerServicer):
    """Serves Sessions: ``welcome`` greets, ``handler`` acts, ``report`` informs."""

    def __init__(
        self,
        *,
        welcome: pb.Welcome,
        handler: SessionHandler,
        report: Callable[[int], pb.Report],
        config: SessionConfig,
    ) -> None:
        """``report`` is given the Session's number."""
        self._welcome = welcome
        self._handler = handler
        self._report = report
        self._config = config
        self._numbers = itertools.count(1)
        self._outboxes: dict[int, asyncio.Queue[pb.WorkerMessage | None]] = {}
        self._cache = CacheFeed(self._post)

    def deliver(self, events: StepEvents) -> None:
        """Sends a step's events; those for gateways that have gone are dropped."""
        messages: dict[int, pb.Events] = {}

        def message(key: StreamKey) -> pb.Events:
            return messages.setdefault(key.session, pb.Events())

        for key, num_held in events.reserved:
            message(key).reserved.add(stream_id=key.stream_id, num_held_tokens=num_held)
        for index, (key, position, token_id) in enumerate(events.tokens):
            batch = message(key).tokens
            if (logprobs := events.logprobs.get(index)) is not None:
                batch.logprobs.append(logprobs.to_proto(len(batch.token_ids)))
            batch.stream_ids.append(key.stream_id)
            batch.positions.append(position)
            batch.token_ids.append(token_id)
        for key, closed in events.closed:
            closed.stream_id = key.stream_id
            message(key).closed.append(closed)
        for session, body in messages.items():
            self._post(session, pb.WorkerMessage(events=body))
        if events.cache:
            self._cache.change(events.cache)

    def _post(self, session: int, message: pb.WorkerMessage) -> None:
        outbox = self._outboxes.get(session)
        if outbox is None:
            return
        if outbox.qsize() >= MAX_PENDING_MESSAGES:
            logger.error("session %d does not read its messages; giving it up", session)
            self._outboxes.pop(session)
            self._cache.leave(session)
            while not outbox.empty():
                outbox.get_nowait()
            outbox.put_nowait(None)
            return
        outbox.put_nowait(message)

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.GatewayMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.WorkerMessage]:
        gateway_id = await self._greet(request_iterator, context)
        yield pb.WorkerMessage(welcome=self._welcome)
        session = next(self._numbers)
        outbox: asyncio.Queue[pb.WorkerMessage | None] = asyncio.Queue()
        self._outboxes[session] = outbox
        self._cache.join(session)
        reader = asyncio.create_task(self._read(session, request_iterator, outbox))
        reporter = asyncio.create_task(self._report_regularly(session))
        logger.info("session %d with %s begins", session, gateway_id)
        try:
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            self._outboxes.pop(session, None)
            self._cache.leave(session)
            reader.cancel()
            reporter.cancel()
            self._handler.on_session_lost(session)
            logger.info("session %d with %s ends", session, gateway_id)

    async def _greet(
        self,
        requests: AsyncIterator[pb.GatewayMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> str:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a Session begins with Hello")
        assert first is not None
        hello, ours = first.hello, self._welcome
        if hello.protocol_version != PROTOCOL_VERSION or hello.generation != ours.generation:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"gateway {hello.gateway_id} speaks protocol {hello.protocol_version} of "
                f"generation {hello.generation!r}; this worker speaks {PROTOCOL_VERSION} of "
                f"{ours.generation!r}",
            )
        return hello.gateway_id

    async def _read(
        self,
        session: int,
        requests: AsyncIterator[pb.GatewayMessage],
        outbox: asyncio.Queue[pb.WorkerMessage | None],
    ) -> None:
        try:
            async for message in requests:
                body = message.WhichOneof("body")
                if body == "open":
                    key = StreamKey(session, message.open.stream_id)
                    self._handler.on_open(key, message.open)
                elif body == "proceed":
                    key = StreamKey(session, message.proceed.stream_id)
                    self._handler.on_proceed(key, message.proceed.num_held_tokens)
                elif body == "cancel":
                    self._handler.on_cancel(StreamKey(session, message.cancel.stream_id))
                elif body == "cache_snapshot_request":
                    self._cache.join(session)
                else:
                    logger.warning("session %d: ignored message %r", session, body)
        except Exception:
            logger.exception("session %d: reading failed", session)
        finally:
            outbox.put_nowait(None)

    async def _report_regularly(self, session: int) -> None:
        while True:
            self._post(session, pb.WorkerMessage(report=self._report(session)))
            await asyncio.sleep(self._config.report_s)
