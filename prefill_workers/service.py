"""The gRPC edge of a prefill worker: a gateway's messages become commands."""

from __future__ import annotations

import time

from baton.errors import BatonError, InvalidRequestError, WorkerLostError
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from engine.intake import check_open, sequence_from_open, stop_rule
from engine.worker_parts import WorkerParts
from kv_transfer.keys import TransferKey
from prefill_workers.scheduler import Lender, PrefillJob
from prefill_workers.worker import PrefillWorker


def lender_of(handoff: pb.Handoff) -> Lender | None:
    """None where the gateway says that nothing is to be pulled."""
    if not handoff.decode_transfer_address:
        return None
    return Lender(handoff.decode_worker_id, handoff.decode_transfer_address)


class PrefillService:
    """Implements SessionHandler; runs on the event loop, acts on the engine thread."""

    def __init__(self, worker: PrefillWorker, parts: WorkerParts) -> None:
        self._worker = worker
        self._plan = parts.plan
        self._epoch = parts.identity.epoch
        self._inbox = parts.inbox
        self._outbox = parts.outbox

    def on_open(self, key: StreamKey, message: pb.Open) -> None:
        try:
            job = self._job(key, message)
        except BatonError as error:
            self._inbox.post(self._outbox.refused, key, error)
        else:
            self._inbox.post(self._worker.open, job)

    def _job(self, key: StreamKey, message: pb.Open) -> PrefillJob:
        check_open(message, self._plan, "prefill")
        if not message.HasField("handoff"):
            raise InvalidRequestError("a prefill worker needs a hand-off to prefill for")
        handoff = message.handoff
        if handoff.prefill_epoch != self._epoch:
            raise WorkerLostError("this prefill worker was restarted since it was chosen")
        return PrefillJob(
            key=key,
            request_id=message.request_id,
            sequence=sequence_from_open(key, message, self._plan),
            stop=stop_rule(message),
            transfer=TransferKey(
                handoff.transfer_id, message.attempt, handoff.prefill_epoch, handoff.decode_epoch
            ),
            lender=lender_of(handoff),
            deadline=time.monotonic() + message.remaining_ms / 1000,
            priority=message.priority,
        )

    def on_proceed(self, key: StreamKey, num_held_tokens: int) -> None:
        self._inbox.post(self._worker.proceed, key, num_held_tokens)

    def on_cancel(self, key: StreamKey) -> None:
        self._inbox.post(self._worker.cancel, key)

    def on_session_lost(self, session: int) -> None:
        self._inbox.post(self._worker.session_lost, session)
