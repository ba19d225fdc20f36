"""One attempt of a choice: open on a decode worker and, with a hand-off, on a prefill worker.

1. RESERVING: opened on both; decode looks for room. ``give_up`` ends it here, when there
   is room elsewhere.
2. PREFILLING: decode has answered Reserved, so prefill was told to proceed; without a
   prefill worker decode computes the input itself.
3. DECODING: decode has sent a token, so it has all it needs; what becomes of the
   prefill side does not matter any more.
4. ENDED: ``finish_reason`` or ``error`` is set, by a worker's word or by a loss.

Everything here happens on the event loop, in the calls of the Sessions; ``wake``
is set after each. ``close`` cancels what is still open, wherever it is.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from baton.errors import (
    BatonError,
    DrainingError,
    InternalError,
    OverloadedError,
    ReservationError,
    RoomElsewhereError,
    TransferError,
    UnavailableError,
    WorkerLostError,
    from_code,
)
from baton.logprobs import TokenLogprobs
from baton.v1 import session_pb2 as pb
from router.request import FinishReason
from router.routing.policy import Pairing
from router.token_merge import TokenMerge
from router.workers.session import WorkerSession

VERDICT_S = 0.5
"""How long a failed hand-off waits for the prefill side's word on why it failed."""

_FINISH: dict[int, FinishReason] = {
    pb.CLOSE_REASON_STOP: "stop",
    pb.CLOSE_REASON_LENGTH: "length",
}
REFUSALS = (ReservationError, OverloadedError)
"""No room on that worker now: pair anew. It counts as no attempt."""
_WELL_ENDED = frozenset({*_FINISH, pb.CLOSE_REASON_HANDED_OFF})


@dataclass(slots=True, eq=False)
class _Side:
    """One worker's part in an attempt, and its Session's sink for it."""

    attempt: Attempt
    session: WorkerSession
    is_open: bool = False
    end: int | None = None
    """The position after the last token that it sent."""
    account: pb.Closed | None = None
    """Its last word, where it ended well."""

    def on_reserved(self, num_held_tokens: int) -> None:
        self.attempt.reserved(self, num_held_tokens)

    def on_token(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None
    ) -> None:
        self.end = max(position + 1, self.end or 0)
        self.attempt.token(position, token_id, at, logprobs)

    def on_closed(self, closed: pb.Closed) -> None:
        self.is_open = False
        if closed.reason in _WELL_ENDED:
            self.account = closed
        self.attempt.closed(self, closed)

    def on_lost(self, error: WorkerLostError) -> None:
        self.is_open = False
        self.attempt.side_failed(self, error)


class Attempt:
    """Follows both sides and merges their tokens; made, opened and closed by its choice."""

    def __init__(
        self, pairing: Pairing, message: pb.Open, tokens: TokenMerge, wake: asyncio.Event
    ) -> None:
        self.finish_reason: FinishReason | None = None
        """Set once every token of the finished choice is in order."""
        self.error: BatonError | None = None
        self.blamed: set[bytes] = set()
        """Epochs of the workers that the next attempt should avoid."""
        self.lost_unheard = False
        """It ended with the loss of a worker that had not answered: one that may have been dead
        before it was asked."""
        self.reserved_at: float | None = None
        """When decode said that it has room, by ``time.perf_counter``."""
        self._message = message
        self._tokens = tokens
        self._wake = wake
        self._first_position = tokens.num_in_order
        self._decode = _Side(self, pairing.decode)
        self._prefill = _Side(self, pairing.prefill) if pairing.prefill is not None else None
        self._proceeded = False
        self._num_held_tokens = 0
        self._verdict: asyncio.TimerHandle | None = None
        self._handoff_error: BatonError | None = None
        self._end: tuple[FinishReason, int] | None = None

    @property
    def has_tokens(self) -> bool:
        """A token that was not known before the attempt has come of it."""
        return self._tokens.num_in_order > self._first_position

    @property
    def worker_ids(self) -> list[str]:
        return [side.session.record.worker_id for side in self._sides()]

    @property
    def decode_epoch(self) -> bytes:
        return self._decode.session.epoch

    @property
    def waits_for_room(self) -> bool:
        """Decode has not said that it has room, so nobody computes anything yet."""
        return not self._ended and not self._has_answered(self._decode)

    @property
    def awaits_account(self) -> bool:
        """The prefill side has yet to say what it computed."""
        return self._prefill is not None and self._prefill.is_open

    def open(self) -> None:
        """Opens on all sides at once; a Session that is lost already ends the attempt."""
        for side in self._sides():
            if self.error is not None:
                return
            try:
                side.session.open(self._message, side)
                side.is_open = True
            except WorkerLostError as error:
                self._fail(error, side)

    def give_up(self) -> None:
        """Ends it because another decode worker has room."""
        assert self.waits_for_room
        worker_id = self._decode.session.record.worker_id
        self._fail(RoomElsewhereError(f"{worker_id} has no room, another has"), self._decode)

    def close(self) -> None:
        """Cancels every side that is still open. Nothing is heard of the attempt after it."""
        if self._verdict is not None:
            self._verdict.cancel()
        for side in self._sides():
            side.is_open = False
            side.session.cancel(self._message.stream_id)

    def num_cached_tokens(self) -> int:
        """Prompt tokens that no worker computed; 0 where that is not known for sure."""
        computing = self._prefill or self._decode
        if computing.account is None:
            return self._num_held_tokens if self._prefill is None else 0
        accounts = [side.account for side in self._sides() if side.account is not None]
        num_computed = max(account.num_computed_tokens for account in accounts)
        return max(0, len(self._message.prompt_token_ids) - num_computed)

    def num_pulled_tokens(self) -> int:
        """Input tokens that prefill fetched from decode, so far as its account has come."""
        account = None if self._prefill is None else self._prefill.account
        return 0 if account is None else account.num_received_tokens

    # ------------------------------------------------------ called by the sides

    def reserved(self, side: _Side, num_held_tokens: int) -> None:
        self._num_held_tokens = num_held_tokens
        if side is self._decode and self.reserved_at is None:
            self.reserved_at = time.perf_counter()
        if side is self._decode and self._prefill is not None and not self._proceeded:
            self._proceeded = True
            self._prefill.session.proceed(self._message.stream_id, num_held_tokens)

    def token(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None
    ) -> None:
        if self._ended:
            return
        try:
            self._tokens.add(position, token_id, at, logprobs)
        except InternalError as error:
            self._fail(error)
        self._settle()

    def closed(self, side: _Side, closed: pb.Closed) -> None:
        finish_reason = _FINISH.get(closed.reason)
        if finish_reason is not None:
            self._finish(side, finish_reason)
        elif closed.reason == pb.CLOSE_REASON_HANDED_OFF and side is self._prefill:
            self._settle()
        elif closed.reason == pb.CLOSE_REASON_FAILED:
            self.side_failed(side, from_code(closed.error_code, closed.error_message))
        elif closed.reason == pb.CLOSE_REASON_CANCELLED:
            worker_id = side.session.record.worker_id
            self.side_failed(side, UnavailableError(f"worker {worker_id} gave the request up"))
        else:
            self._fail(InternalError(f"a worker closed a stream with reason {closed.reason}"))

    def side_failed(self, side: _Side, error: BatonError) -> None:
        if side is self._prefill and self._decode.end is not None:
            self._settle()  # decode has taken over already
        elif self._prefill_knows_better(side, error):
            self._handoff_error = error
            loop = asyncio.get_running_loop()
            self._verdict = loop.call_later(VERDICT_S, self._no_verdict, error)
        elif isinstance(self._handoff_error, DrainingError):
            self._tell_who_leaves(self._handoff_error, error)
        else:
            self._fail(error, side)

    def _no_verdict(self, error: BatonError) -> None:
        prefill_leaves = self._prefill is not None and self._prefill.session.draining
        is_leaving = isinstance(error, DrainingError)
        self._fail(error, self._prefill if prefill_leaves and is_leaving else self._decode)

    def _tell_who_leaves(self, error: DrainingError, of_prefill: BatonError) -> None:
        """Decode has said that somebody is leaving, and this is prefill's word."""
        if isinstance(of_prefill, TransferError):
            self._fail(error, self._decode)  # prefill has only heard of the hand-off's end
        elif isinstance(of_prefill, WorkerLostError):
            self._fail(error, self._prefill)
        else:
            self._fail(of_prefill, self._prefill)

    def _prefill_knows_better(self, side: _Side, error: BatonError) -> bool:
        """A hand-off ends on both sides, and the news race over two Sessions. Prefill's
        say why: perhaps the request has ended there, with its first token, or it is the
        prefill worker that is leaving, which decode passes on as its peer's word."""
        if side is not self._decode or self._prefill is None or not self._prefill.is_open:
            return False
        if isinstance(error, DrainingError):
            return self._proceeded and not side.session.draining and self._handoff_error is None
        return isinstance(error, TransferError) and self._handoff_error is None

    # ------------------------------------------------------------------ inside

    @property
    def _ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def _sides(self) -> list[_Side]:
        return [self._decode] if self._prefill is None else [self._decode, self._prefill]

    def _has_answered(self, side: _Side) -> bool:
        """Decode's answer is that it has room, prefill's a token."""
        if side is not self._decode:
            return side.end is not None
        return self.reserved_at is not None or self.has_tokens

    def _finish(self, side: _Side, finish_reason: FinishReason) -> None:
        """A worker says that it has sent the choice's last token."""
        if side.end is None:
            self._fail(InternalError("a worker finished a choice without a token"))
            return
        if finish_reason == "length" and side.end < self._message.max_tokens:
            of = f"of {self._message.max_tokens} tokens"
            self._fail(
                InternalError(f"a worker ended a choice for its length after {side.end} {of}")
            )
            return
        self._end = (finish_reason, side.end)
        if side is self._prefill:
            self._decode.is_open = False
            self._decode.session.cancel(self._message.stream_id)
        self._settle()

    def _settle(self) -> None:
        """Ends the attempt once all is there, or nobody is left to send what is missing."""
        self._wake.set()
        if self._ended:
            return
        if self._end is not None and self._tokens.num_in_order >= self._end[1]:
            self.finish_reason = self._end[0]
        elif not any(side.is_open for side in self._sides()):
            nobody = InternalError("tokens are missing, and no worker has the request open")
            self._fail(self._handoff_error or nobody, self._decode)

    def _fail(self, error: BatonError, side: _Side | None = None) -> None:
        if self._ended:
            return
        if side is not None and isinstance(error, DrainingError):
            side.session.draining = True
        blamed = [] if side is None else [side]
        if isinstance(error, TransferError):
            blamed = self._sides()
        leaving = [one for one in blamed if one.session.draining]
        if leaving and error.retriable and not isinstance(error, REFUSALS):
            # Whatever else is said of a worker that leaves, this is why.
            blamed = leaving
            if not isinstance(error, DrainingError):
                error = DrainingError(f"a worker is leaving: {error.message}")
        self.error = error
        lost = side if isinstance(error, WorkerLostError) else None
        self.lost_unheard = lost is not None and not self._has_answered(lost)
        self.blamed = {one.session.epoch for one in blamed}
        self._wake.set()
