"""This gateway's end of the Session with one worker process.

1. GREETING: Hello is sent and Welcome awaited (``handshake.py``).
2. LIVE: streams may be opened, and the worker's events reach their sinks, while
   ``run`` runs.
3. LOST: the stream has ended, failed, been silent for too long, or been closed.
   Every open stream has been told, and nothing is ever sent again.

A Session can be lost while its worker lives on; another one takes its place then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from baton.config import SessionConfig
from baton.errors import WorkerLostError
from baton.logprobs import TokenLogprobs
from baton.records import WorkerRecord
from baton.telemetry import GatewayMetrics
from baton.v1 import session_pb2 as pb
from router.routing.kv_index import KvIndex
from router.workers.given_work import GivenWork
from router.workers.handshake import STREAM_ENDED, Call, being_cancelled, reason_of

logger = logging.getLogger(__name__)


class StreamSink(Protocol):
    """Takes one stream's events, on the event loop; never raises."""

    def on_reserved(self, num_held_tokens: int) -> None: ...

    def on_token(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None
    ) -> None:
        """``at``, by ``time.perf_counter``, is the same for all tokens of a message."""
        ...

    def on_closed(self, closed: pb.Closed) -> None:
        """The worker's last word on the stream."""
        ...

    def on_lost(self, error: WorkerLostError) -> None:
        """The Session is lost, and the stream with it."""
        ...


class WorkerSession:
    """One greeted stream; whoever makes it awaits ``run``."""

    def __init__(
        self,
        record: WorkerRecord,
        call: Call,
        config: SessionConfig,
        *,
        kv_dtype: str,
        index: KvIndex,
        metrics: GatewayMetrics | None = None,
    ) -> None:
        """``metrics``: where the KV events are counted, if they are."""
        self.record = record
        self.kv_dtype = kv_dtype
        self.epoch = bytes.fromhex(record.epoch)
        self.lost: str | None = None
        """Why, once it is."""
        self.draining = False
        """The worker is leaving: it said so in an answer or in its last report."""
        self.report: pb.Report | None = None
        self.reported_at: float | None = None
        """When it came, on the event loop's clock."""
        self.load_at: float | None = None
        """When the worker took the report's counts, on the same clock."""
        self.given = GivenWork()
        self._call = call
        self._config = config
        self._index = index
        self._metrics = metrics
        self._sinks: dict[int, StreamSink] = {}
        self._outbox: asyncio.Queue[pb.GatewayMessage] = asyncio.Queue()

    @property
    def num_open(self) -> int:
        """Streams of this gateway's that are open on it."""
        return len(self._sinks)

    @property
    def num_sequences(self) -> int:
        """Sequences on the worker, all gateways' counted: as last reported, plus
        what this gateway has opened beyond it and seen closed since."""
        report = self.report or pb.Report()
        reported = report.num_running + report.num_waiting
        return max(self.num_open, reported + self.given.num_sequences)

    def has_room_for(self, num_tokens: int) -> bool:
        """A decode worker could reserve blocks for such an input at once: nobody waits for
        room there and more than enough is free or cached, as last reported and less what
        this gateway has opened beyond that."""
        report = self.report
        if report is None or report.num_waiting > 0:
            return False
        available = report.blocks.free + report.blocks.cached - self.given.num_blocks
        return available > self._num_blocks(num_tokens)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.record.block_size)

    def open(self, message: pb.Open, sink: StreamSink) -> None:
        """Opens a stream whose events go to ``sink`` until it is closed, cancelled or lost.

        Raises: WorkerLostError when the Session is lost already.
        """
        if self.lost is not None:
            raise self._lost_error()
        assert message.stream_id not in self._sinks, "a stream id was drawn twice"
        self._sinks[message.stream_id] = sink
        num_tokens = len(message.prompt_token_ids) + len(message.emitted_token_ids)
        self.given.opened(message.stream_id, self._num_blocks(num_tokens))
        self._outbox.put_nowait(pb.GatewayMessage(open=message))

    def proceed(self, stream_id: int, num_held_tokens: int) -> None:
        """Lets a prefill begin; nothing happens where the stream is not open any more."""
        if stream_id in self._sinks:
            proceed = pb.Proceed(stream_id=stream_id, num_held_tokens=num_held_tokens)
            self._outbox.put_nowait(pb.GatewayMessage(proceed=proceed))

    def cancel(self, stream_id: int) -> None:
        """Ends a stream from this side; its sink hears nothing more. Idempotent."""
        if self._sinks.pop(stream_id, None) is not None:
            self.given.ended(stream_id)
            self._outbox.put_nowait(pb.GatewayMessage(cancel=pb.Cancel(stream_id=stream_id)))

    async def run(self) -> str:
        """Carries messages both ways until the Session is lost; returns why."""
        # One writer task: whoever sends puts into the outbox, which holds at most an
        # Open, a Proceed and a Cancel for every stream, and now and then the request
        # for a snapshot.
        self._index.join(self.epoch, num_blocks=self.record.num_blocks)
        tasks = {asyncio.create_task(self._read()), asyncio.create_task(self._write())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self.close(self._reason(done.pop()))
        finally:
            self.close("this gateway closed the Session")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert self.lost is not None
        return self.lost

    def _reason(self, task: asyncio.Task[str]) -> str:
        try:
            return task.result()
        except Exception as error:
            logger.exception("Session with %s failed", self.record.worker_id)
            return f"its messages could not be handled ({type(error).__name__})"

    def close(self, reason: str) -> None:
        """Loses the Session, if it is not lost yet: every open stream is told at once."""
        if self.lost is not None:
            return
        self.lost = reason
        self._call.cancel()
        self._index.forget(self.epoch)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.on_lost(self._lost_error())

    def _lost_error(self) -> WorkerLostError:
        return WorkerLostError(f"worker {self.record.worker_id} was lost: {self.lost}")

    async def _write(self) -> str:
        while True:
            message = await self._outbox.get()
            try:
                await self._call.write(message)
            except STREAM_ENDED as error:
                if being_cancelled():
                    raise
                return reason_of(error)

    async def _read(self) -> str:
        silence_s = self._config.silence_s
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await self._call.read()
            except TimeoutError:
                return f"silent for {silence_s:g} s"
            except STREAM_ENDED as error:
                if being_cancelled():
                    raise
                return reason_of(error)
            if not isinstance(message, pb.WorkerMessage):
                return "it ended the Session"
            self._take(message)

    def _take(self, message: pb.WorkerMessage) -> None:
        body = message.WhichOneof("body")
        if body == "events":
            self._take_events(message.events)
        elif body == "report":
            self.report = message.report
            self.draining = message.report.draining
            self.reported_at = asyncio.get_running_loop().time()
            self.load_at = self.reported_at - message.report.load_age_ms / 1000
            self.given.reported(message.report.num_opens)
        elif body == "cache_events":
            self._take_cache_events(message.cache_events)
        else:
            logger.warning("%s sent an unexpected %r", self.record.worker_id, body)

    def _take_cache_events(self, events: pb.CacheEvents) -> None:
        gap = self._index.take(self.epoch, events)
        if gap:
            logger.info("asking %s for a snapshot of its cache", self.record.worker_id)
            request = pb.CacheSnapshotRequest()
            self._outbox.put_nowait(pb.GatewayMessage(cache_snapshot_request=request))
        if self._metrics is not None:
            self._metrics.kv_index_events.inc()
            self._metrics.kv_index_snapshot_requests.inc(gap)

    def _take_events(self, events: pb.Events) -> None:
        """Events of streams that are not open (any more) are late, and dropped."""
        for reserved in events.reserved:
            if (sink := self._sinks.get(reserved.stream_id)) is not None:
                sink.on_reserved(reserved.num_held_tokens)
        batch, at = events.tokens, time.perf_counter()
        logprobs = {each.index: TokenLogprobs.from_proto(each) for each in batch.logprobs}
        for index, (stream_id, position, token_id) in enumerate(
            zip(batch.stream_ids, batch.positions, batch.token_ids, strict=True)
        ):
            if (sink := self._sinks.get(stream_id)) is not None:
                self.given.computed(stream_id)
                sink.on_token(position, token_id, at, logprobs.get(index))
        for closed in events.closed:
            if (sink := self._sinks.pop(closed.stream_id, None)) is not None:
                self.given.ended(closed.stream_id)
                sink.on_closed(closed)
