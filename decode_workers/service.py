"""The gRPC edge of a decode worker: a gateway's messages become commands."""

from __future__ import annotations

import logging
import time

from baton.errors import BatonError, WorkerLostError
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeStream
from decode_workers.worker import DecodeWorker
from engine.intake import check_open, sequence_from_open, stop_rule
from engine.worker_parts import WorkerParts
from kv_transfer.keys import TransferKey

logger = logging.getLogger(__name__)


class DecodeService:
    """Implements SessionHandler; runs on the event loop, acts on the engine thread."""

    def __init__(self, worker: DecodeWorker, parts: WorkerParts) -> None:
        self._worker = worker
        self._plan = parts.plan
        self._epoch = parts.identity.epoch
        self._inbox = parts.inbox
        self._outbox = parts.outbox

    def on_open(self, key: StreamKey, message: pb.Open) -> None:
        try:
            stream = self._stream(key, message)
        except BatonError as error:
            self._inbox.post(self._outbox.refused, key, error)
        else:
            self._inbox.post(self._worker.open, stream)

    def _stream(self, key: StreamKey, message: pb.Open) -> DecodeStream:
        check_open(message, self._plan, "decode")
        handoff = message.handoff if message.HasField("handoff") else None
        transfer = None
        if handoff is not None:
            if handoff.decode_epoch != self._epoch:
                raise WorkerLostError("this decode worker was restarted since it was chosen")
            transfer = TransferKey(
                handoff.transfer_id, message.attempt, handoff.prefill_epoch, handoff.decode_epoch
            )
        now = time.monotonic()
        sequence = sequence_from_open(key, message, self._plan)
        return DecodeStream(
            key=key,
            request_id=message.request_id,
            sequence=sequence,
            stop=stop_rule(message),
            deadline=now + message.remaining_ms / 1000,
            transfer=transfer,
            handoff=handoff,
            queued_at=now,
            priority=message.priority,
            num_input_tokens=sequence.num_tokens,
        )

    def on_proceed(self, key: StreamKey, num_held_tokens: int) -> None:
        logger.warning("ignored Proceed for stream %d: this is a decode worker", key.stream_id)

    def on_cancel(self, key: StreamKey) -> None:
        self._inbox.post(self._worker.cancel, key)

    def on_session_lost(self, session: int) -> None:
        self._inbox.post(self._worker.session_lost, session)
