"""The decode loop: reserves, receives, lends, decodes, and prefills locally where it must.

Everything here runs on the engine thread, between or in its steps. Blocks that a
failed or cancelled hand-off may still write to are quarantined until the
receiver says that nothing is in flight any more (``drained``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from baton.config import EngineConfig, KvTransferConfig
from baton.errors import (
    BatonError,
    DeadlineExceededError,
    DrainingError,
    ReservationError,
)
from baton.faults import Faults
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2 as pb
from baton.worker.inbox import Inbox
from baton.worker.outbox import InputUse, Load, Outbox
from baton.worker.session_server import StreamKey
from decode_workers.lends import Lends
from decode_workers.scheduler import DecodeScheduler, DecodeStream, StreamState
from engine.engine import Engine
from engine.sequence import Sampled, Sequence
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from kv_transfer.service import KvSender

logger = logging.getLogger(__name__)


class DecodeWorker:
    """Owns all streams of this process. ``receiver`` and ``lender`` are called on the event
    loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        scheduler: DecodeScheduler,
        receiver: KvReceiver,
        lender: KvSender,
        inbox: Inbox,
        outbox: Outbox,
        metrics: WorkerMetrics,
        faults: Faults,
        config: EngineConfig,
        transfer_config: KvTransferConfig,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._receiver = receiver
        self._inbox = inbox
        self._outbox = outbox
        self._metrics = metrics
        self._faults = faults
        self._config = config
        self._reserve_s = transfer_config.reserve_s
        self._streams: dict[StreamKey, DecodeStream] = {}
        self._transfers: dict[TransferKey, DecodeStream] = {}
        self.lends = Lends(engine.kv, lender, inbox, receiving=self._receiving)
        self._quarantined: dict[TransferKey, list[int]] = {}
        self._num_steps = 0
        self._num_preemptions = 0
        self._draining = False

    # ------------------------------------------------------------- commands

    def open(self, stream: DecodeStream) -> None:
        """Queues a stream for room, or refuses it."""
        self._faults.hit("decode.open")
        self._outbox.opened(stream.key)
        if stream.key in self._streams:
            logger.error("request %s: its stream id is in use; ignored", stream.request_id)
        elif self._draining:
            self._outbox.failed(stream.key, DrainingError("this decode worker is going away"))
        elif len(self._streams) >= self._scheduler.max_running + self._config.max_waiting:
            self._outbox.failed(stream.key, ReservationError("this decode worker's queue is full"))
        else:
            self._streams[stream.key] = stream
            self._scheduler.enqueue(stream)

    def cancel(self, key: StreamKey) -> None:
        """Ends a stream in any state; unknown keys are late cancels and do nothing."""
        stream = self._streams.get(key)
        if stream is not None:
            self._end(stream)
            self._outbox.closed(key, pb.CLOSE_REASON_CANCELLED, stream.use)

    def session_lost(self, session: int) -> None:
        """Ends every stream of a gateway that has gone."""
        self._outbox.session_lost(session)
        for key in [key for key in self._streams if key.session == session]:
            self._end(self._streams[key])

    def handed_over(
        self,
        transfer: TransferKey,
        first_token_id: int,
        first_position: int,
        num_received: int,
        first_logprobs: TokenLogprobs | None = None,
    ) -> None:
        """READY: the input's KV is here and nobody writes it any more."""
        self._faults.hit("decode.adopt")
        stream = self._transfers.pop(transfer, None)
        if stream is None:
            self.drained(transfer)
            return
        sequence = stream.sequence
        num_held = stream.num_input_tokens - num_received
        stream.use = InputUse(num_cached_tokens=num_held, num_received_tokens=num_received)
        self._outbox.count_input(stream.use)
        stream.counted = True
        self._engine.kv.adopt(sequence, stream.num_input_tokens)
        sequence.token_ids.append(first_token_id)
        self._scheduler.received(stream)
        self._outbox.token(stream.key, first_position, first_token_id, first_logprobs)

    def handoff_failed(self, transfer: TransferKey, error: BatonError) -> None:
        """Never READY: the gateway decides where the request goes on."""
        stream = self._transfers.get(transfer)
        if stream is not None:
            self._end(stream, cancel_transfer=False)
            self._outbox.failed(stream.key, error)

    def drained(self, transfer: TransferKey) -> None:
        """Nothing of that hand-off can write any more: its blocks are free."""
        blocks = self._quarantined.pop(transfer, None)
        if blocks is not None:
            self._engine.kv.pool.end_quarantine(blocks)

    def drain(self) -> None:
        """Admits nothing more."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """No stream, no lend and no quarantine is left. Read by other threads: a hint."""
        return not self._streams and not self.lends and not self._quarantined

    def fail_all(self, error: BatonError) -> None:
        """Answers every stream with ``error``."""
        for stream in list(self._streams.values()):
            self._end(stream)
            self._outbox.failed(stream.key, error)

    def _receiving(self, transfer: TransferKey) -> Sequence | None:
        stream = self._transfers.get(transfer)
        return None if stream is None else stream.sequence

    def _end(self, stream: DecodeStream, *, cancel_transfer: bool = True) -> None:
        """Forgets a stream and gives its blocks back, to quarantine where they must."""
        del self._streams[stream.key]
        receiving = stream.state is StreamState.RECEIVING
        self._scheduler.remove(stream)
        if not receiving:
            self._engine.kv.free(stream.sequence)
            return
        assert stream.transfer is not None
        del self._transfers[stream.transfer]
        self._quarantined[stream.transfer] = self._engine.kv.quarantine(stream.sequence)
        if cancel_transfer:
            self._on_loop(self._receiver.cancel, stream.transfer)

    def _on_loop(self, method: Callable[..., None], *args: object, **kwargs: object) -> None:
        self._inbox.call(partial(method, *args, **kwargs))

    # ----------------------------------------------------------------- step

    def step(self) -> bool:
        """One engine step over the batch. False: there was nothing to compute."""
        now = time.monotonic()
        self._expire(now)
        for stream in self._scheduler.admit():
            if stream.transfer is None:
                assert stream.num_cached_tokens is not None
                self._outbox.reserved(stream.key, stream.num_cached_tokens)
            else:
                self._receive(stream)
        chunks = self._scheduler.schedule()
        self._count_preemptions()
        if chunks:
            self._outbox.flush()  # reservations do not wait for the step
            self._outbox.set_load(self._load())
            self._faults.hit("decode.step")
            began = time.perf_counter()
            sampled = self._engine.step(chunks)
            self._metrics.step_seconds.observe(time.perf_counter() - began)
            self._metrics.steps.inc()
            self._num_steps += 1
            self._metrics.output_tokens.inc(len(sampled))
            for result in sampled:
                self._emit(result)
        self._outbox.cache_changed(self._engine.kv.pool.take_changes())
        self._outbox.flush()
        self._outbox.set_load(self._load())
        return bool(chunks)

    def _expire(self, now: float) -> None:
        for stream in [s for s in self._streams.values() if s.deadline <= now]:
            self._end(stream)
            self._outbox.failed(
                stream.key, DeadlineExceededError("the request's deadline passed on decode")
            )
        for stream in self._scheduler.queued:
            if stream.transfer is not None and now - stream.queued_at > self._reserve_s:
                self._end(stream)
                error = ReservationError(f"no room for its KV within {self._reserve_s:g} s")
                self._outbox.failed(stream.key, error)

    def _receive(self, stream: DecodeStream) -> None:
        """RECEIVING begins: tell the gateway, and pull what is not held already."""
        assert stream.transfer is not None
        assert stream.handoff is not None
        sequence = stream.sequence
        num_held = sequence.num_shared_tokens
        self._transfers[stream.transfer] = stream
        self._faults.hit("decode.reserved")
        self._outbox.reserved(stream.key, num_held)
        self._on_loop(
            self._receiver.begin,
            stream.transfer,
            address=stream.handoff.prefill_transfer_address,
            source_worker_id=stream.handoff.prefill_worker_id,
            start_token=num_held,
            num_tokens=stream.num_input_tokens,
            block_ids=sequence.block_table[num_held // self._engine.kv.layout.block_size :],
        )

    def _emit(self, sampled: Sampled) -> None:
        assert isinstance(sampled.seq.key, StreamKey)
        stream = self._streams[sampled.seq.key]
        sequence = stream.sequence
        if not stream.counted:
            stream.use = stream.local_use
            self._outbox.count_input(stream.use)
            stream.counted = True
        num_emitted = sequence.num_tokens - sequence.num_prompt_tokens
        self._outbox.token(stream.key, num_emitted - 1, sampled.token_id, sampled.logprobs)
        reason = stream.stop.reason(sampled.token_id, num_emitted)
        if reason is not None:
            self._end(stream)
            self._outbox.closed(stream.key, reason, stream.use)

    def _count_preemptions(self) -> None:
        total = self._scheduler.num_preemptions
        if total > self._num_preemptions:
            self._metrics.preemptions.inc(total - self._num_preemptions)
            self._num_preemptions = total

    def _load(self) -> Load:
        counts = self._engine.kv.pool.counts()
        return Load(
            num_steps=self._num_steps,
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_waiting_tokens=self._scheduler.num_tokens_to_compute,
            free=counts.free,
            cached=counts.cached,
            referenced=counts.referenced,
            quarantined=counts.quarantined,
            draining=self._draining,
        )
