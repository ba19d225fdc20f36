"""One admitted choice, from its first attempt to its last token.

1. PAIRING: the policy names workers; refusals and an empty pool are waited out.
2. ATTEMPTING: ``attempt.py`` follows the workers; tokens go to whoever asks ``next``.
   A failure that another attempt may cure leads back to 1, with the tokens so far; so
   does room on another decode worker while this one has none.
3. ENDED: finished, failed for good, aborted, or closed by whoever made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from baton.errors import (
    BatonError,
    ContextLengthError,
    DeadlineExceededError,
    DrainingError,
    RoomElsewhereError,
    UnavailableError,
)
from baton.records import Role
from baton.telemetry import GatewayMetrics
from baton.timeline import Timeline
from baton.v1 import session_pb2 as pb
from router.attempt import REFUSALS, Attempt
from router.request import ChoiceOutput, ChoiceRequest, FinishReason
from router.routing.input_hashes import BlockNames, InputHashes
from router.routing.policy import Pairing, RoutingPolicy
from router.token_merge import TokenMerge
from router.workers.pool import WorkerPool
from router.workers.session import WorkerSession

logger = logging.getLogger(__name__)

TRANSFER_ID_BYTES = 16
ACCOUNT_WAIT_S = 0.25
"""How long the last output waits for the prefill worker's account, which left it
before decode could begin and comes over another Session."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
ROOM_PATIENCE_S = 1.0
"""How long an attempt keeps its place in a decode worker's line before it looks for room
elsewhere: a worker answers between two steps, and its line moves whenever a stream ends.
A stream that a client watches shall pause for no more than a few times that."""
ROOM_MOVE_PAUSE_S = 5.0
"""Between two such moves of a choice. Each gives up a place in a line for room in a report
that may be ``session.report_s`` old, and that others may take first."""
ROOM_LOOK_S = 0.5
ROOM_LOOK_BEGUN_S = 0.1
"""Between two looks: streams that have begun look oftener, so that they find room first."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What all choices of a gateway share."""

    pool: WorkerPool
    policy: RoutingPolicy
    metrics: GatewayMetrics
    stream_ids: Iterator[int]
    """Never gives the same id twice."""
    rng: random.Random
    names: BlockNames | None
    """How workers name blocks; None where the policy does not ask."""
    max_attempts: int
    wait_for_worker_s: float
    """How long a new choice waits for a decode worker when there is none."""
    wait_for_recovery_s: float
    """The same for a choice whose worker was lost: its replacement has to start."""
    prefill_pulls: bool
    """Prefill workers may fetch what decode workers hold."""


class ChoiceRun:
    """Made on the event loop; ``close`` gives everything back, whatever has happened."""

    def __init__(self, choice: ChoiceRequest, serving: Serving, timeline: Timeline) -> None:
        self._choice = choice
        self._serving = serving
        self._timeline = timeline
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._tokens = TokenMerge(choice.max_tokens)
        self._hashes = InputHashes(serving.names, cache_salt=choice.cache_salt)
        self._attempt: Attempt | None = None
        self._number = 0
        self._num_unheard = 0
        self._cause = "first"
        self._failed: set[bytes] = set()
        self._refused: set[bytes] = set()
        self._left: set[bytes] = set()
        self._too_small: set[bytes] = set()
        self._may_move_at = 0.0
        self._moves_to: list[WorkerSession] = []
        self._pause_s = FIRST_PAUSE_S
        self._num_cached_tokens: int | None = None
        self._aborted: BatonError | None = None
        too_late = DeadlineExceededError("the request's deadline passed")
        self._expiry = self._loop.call_at(choice.deadline, self.abort, too_late)
        if choice.deadline <= self._loop.time():
            self.abort(too_late)

    def abort(self, error: BatonError) -> None:
        """Cancels what is open on the workers now, and ends the choice with ``error`` once
        the tokens that are here have been asked for."""
        if self._aborted is None:
            self._aborted = error
            if self._attempt is not None:
                self._attempt.close()
            self._wake.set()

    def close(self) -> None:
        """Cancels what is open on the workers. Idempotent."""
        self._expiry.cancel()
        self._end_attempt()

    async def next(self) -> ChoiceOutput:
        """The next tokens; the last output has a finish reason. Raises a BatonError."""
        while True:
            attempt = self._attempt or await self._begin()
            output = await self._receive(attempt)
            if output is not None:
                return output
            self._end_attempt()
            assert attempt.error is not None
            self._timeline.failed(attempt.error.code)
            finish_reason = self._finished_all_but(attempt.error)
            if finish_reason is not None:
                return ChoiceOutput((), finish_reason, self._num_cached_tokens or 0)
            await self._recover(attempt, attempt.error)

    # ----------------------------------------------------------------- pairing

    async def _begin(self) -> Attempt:
        pairing = await self._pair()
        attempt = Attempt(pairing, self._message(pairing), self._tokens, self._wake)
        self._attempt = attempt
        metrics = self._serving.metrics
        metrics.attempts.labels(cause=self._cause).inc()
        kind = "local" if pairing.prefill is None else "disaggregated"
        metrics.routing_decisions.labels(kind=kind).inc()
        attempt.open()
        self._may_move_at = max(self._may_move_at, self._loop.time() + ROOM_PATIENCE_S)
        self._timeline.opened(
            self._cause,
            prefill=None if pairing.prefill is None else pairing.prefill.record.worker_id,
            decode=pairing.decode.record.worker_id,
            candidates=pairing.candidates,
        )
        return attempt

    async def _pair(self) -> Pairing:
        serving = self._serving
        begun = self._number > 0 or self._tokens.num_in_order > 0 or bool(self._left)
        patience_s = serving.wait_for_recovery_s if begun else serving.wait_for_worker_s
        give_up_at = self._loop.time() + patience_s
        with self._serving.pool.watched_by(self._wake):
            while True:
                self._check()
                await self._prepare_hashes()
                began = time.perf_counter()
                decode = [w for w in self._moves_to if w.lost is None and not w.draining]
                self._moves_to = []
                pairing = serving.policy.pick(
                    self._hashes,
                    self._candidates("prefill"),
                    decode or self._candidates("decode"),
                )
                serving.metrics.routing_seconds.observe(time.perf_counter() - began)
                if pairing is not None:
                    return pairing
                if self._loop.time() >= give_up_at:
                    raise self._nobody_serves(begun)
                await self._wait(give_up_at)

    async def _prepare_hashes(self) -> None:
        """Names the input's blocks as the workers there are do."""
        pool = self._serving.pool
        token_ids = [*self._choice.prompt_token_ids, *self._tokens.token_ids]
        await self._hashes.prepare(token_ids, [*pool.sessions("prefill"), *pool.sessions("decode")])
        self._check()

    def _able(self, role: Role) -> list[WorkerSession]:
        """Workers that may be given work, hold the choice as it stands, and have neither said
        that they do not nor been left."""
        num_emitted = self._tokens.num_in_order
        needed = self._choice.context_needed(role, num_emitted_tokens=num_emitted)
        avoided = self._left | self._too_small
        return [
            worker
            for worker in self._serving.pool.sessions(role)
            if worker.epoch not in avoided and worker.record.max_model_len >= needed
        ]

    def _nobody_serves(self, begun: bool) -> BatonError:
        """For a new choice the refusal that it would get if it came now; one that has had a
        worker waits for the like of it."""
        ready = self._serving.pool.sessions("decode")
        if not ready:
            return UnavailableError("no decode worker is ready")
        needed = self._choice.context_needed("decode", num_emitted_tokens=0)
        longest = max(worker.record.max_model_len for worker in ready)
        recent = self._serving.pool.recent_max_model_len() or longest
        if begun or recent >= needed:
            return UnavailableError(f"no decode worker that holds {needed} tokens is ready")
        return ContextLengthError(
            f"prompt and answer need {needed} tokens; the decode workers that are ready hold "
            f"{longest} at most"
        )

    def _candidates(self, role: Role) -> list[WorkerSession]:
        """Able workers that have not failed this choice, and not just refused it, where such
        exist. A failed prefill worker is not tried again: decode can do its work."""
        workers = self._able(role)
        sound = [w for w in workers if w.epoch not in self._failed]
        if role == "prefill":
            workers = sound
        willing = [w for w in workers if w.epoch not in self._refused]
        return [w for w in sound if w.epoch not in self._refused] or willing or workers

    def _message(self, pairing: Pairing) -> pb.Open:
        choice, handoff = self._choice, None
        if pairing.prefill is not None:
            pulls, lender = self._serving.prefill_pulls, pairing.decode.record.address
            handoff = pb.Handoff(
                transfer_id=secrets.token_bytes(TRANSFER_ID_BYTES),
                prefill_epoch=pairing.prefill.epoch,
                decode_epoch=pairing.decode.epoch,
                prefill_worker_id=pairing.prefill.record.worker_id,
                decode_worker_id=pairing.decode.record.worker_id,
                prefill_transfer_address=pairing.prefill.record.address,
                decode_transfer_address=lender if pulls else "",
            )
        return pb.Open(
            stream_id=next(self._serving.stream_ids),
            request_id=choice.request_id,
            choice_index=choice.choice_index,
            attempt=self._number,
            prompt_token_ids=choice.prompt_token_ids,
            emitted_token_ids=self._tokens.token_ids,
            sampling=choice.sampling.to_proto(),
            max_tokens=choice.max_tokens,
            stop_token_ids=sorted(choice.stop_token_ids),
            remaining_ms=max(1, int((choice.deadline - self._loop.time()) * 1000)),
            traceparent=choice.traceparent,
            tracestate=choice.tracestate,
            cache_salt=choice.cache_salt,
            handoff=handoff,
            priority=choice.priority,
        )

    # -------------------------------------------------------------- attempting

    async def _receive(self, attempt: Attempt) -> ChoiceOutput | None:
        """None: the attempt has failed, and all its tokens have been taken."""
        while True:
            if attempt.reserved_at is not None:
                self._timeline.reserved(attempt.reserved_at)
            token_ids, arrivals, logprobs = self._tokens.take()
            for arrival in arrivals:
                self._timeline.arrived(arrival.num_tokens, arrival.at)
            finish_reason = attempt.finish_reason
            if finish_reason is not None and not (token_ids and attempt.awaits_account):
                await self._wait_account(attempt)
                self._end_attempt()
                num_cached = self._num_cached_tokens or 0
                return ChoiceOutput(token_ids, finish_reason, num_cached, arrivals, logprobs)
            if token_ids:
                num_cached = self._cached_tokens(attempt)
                return ChoiceOutput(token_ids, None, num_cached, arrivals, logprobs)
            if attempt.error is not None:
                return None
            await self._wait(self._look_for_room(attempt))

    def _look_for_room(self, attempt: Attempt) -> float | None:
        """Gives the attempt up where it has waited long enough for room and another decode
        worker has it. Returns when to look again, None: not at all."""
        if not attempt.waits_for_room:
            return None
        now = self._loop.time()
        if now < self._may_move_at:
            return self._may_move_at
        num_emitted = self._tokens.num_in_order
        num_tokens = len(self._choice.prompt_token_ids) + num_emitted
        avoided = self._failed | {attempt.decode_epoch}
        self._moves_to = [
            worker
            for worker in self._able("decode")
            if worker.epoch not in avoided and worker.has_room_for(num_tokens)
        ]
        if self._moves_to:
            self._may_move_at = now + ROOM_MOVE_PAUSE_S
            attempt.give_up()
        return now + (ROOM_LOOK_BEGUN_S if num_emitted else ROOM_LOOK_S)

    def _cached_tokens(self, attempt: Attempt) -> int:
        """Those of the attempt that gave the first token, so far as it is known: the
        others find their input in caches that this choice has filled."""
        if self._num_cached_tokens is not None:
            return self._num_cached_tokens
        return attempt.num_cached_tokens() if attempt.has_tokens else 0

    async def _wait_account(self, attempt: Attempt) -> None:
        until = self._loop.time() + ACCOUNT_WAIT_S
        with contextlib.suppress(BatonError):
            while attempt.awaits_account and self._loop.time() < until:
                await self._wait(until)

    async def _wait(self, until: float | None = None) -> None:
        """Until something has happened, or until that time. Raises what ``abort`` was given."""
        if until is None:  # so for every token: no timeout is made for one
            await self._wake.wait()
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._wake.wait()
        self._wake.clear()
        self._check()

    def _check(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    def _end_attempt(self) -> None:
        """Cancels what is open of the attempt, and keeps its account if it counts."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.close()
        self._timeline.pulled(attempt.num_pulled_tokens())
        self._tokens.forget_ahead()
        if self._num_cached_tokens is None and attempt.has_tokens:
            self._num_cached_tokens = attempt.num_cached_tokens()

    # ---------------------------------------------------------------- recovery

    def _finished_all_but(self, error: BatonError) -> FinishReason | None:
        """The worker was lost between the last token and its word that it was the last."""
        token_ids = self._tokens.token_ids
        if not error.retriable or not token_ids:
            return None
        if token_ids[-1] in self._choice.stop_token_ids:
            return "stop"
        return "length" if len(token_ids) >= self._choice.max_tokens else None

    async def _recover(self, attempt: Attempt, error: BatonError) -> None:
        """Makes ready for another attempt. Raises ``error`` where there will be none."""
        refused, leaves = isinstance(error, REFUSALS), isinstance(error, DrainingError)
        too_small = isinstance(error, ContextLengthError) and self._another_holds(attempt)
        is_free = attempt.lost_unheard and self._num_unheard < self._serving.max_attempts
        if not (refused or leaves or too_small or is_free):
            self._check_attempts_left(error)
        logger.info(
            "request_id=%s choice=%d attempt=%d worker_id=%s ended (%s): %s",
            self._choice.request_id,
            self._choice.choice_index,
            self._number,
            ",".join(sorted(attempt.worker_ids)),
            error.code,
            error.message,
        )
        self._cause = error.code
        if isinstance(error, RoomElsewhereError) and self._moves_to:
            return  # nobody's fault, and it happens rarely enough to use up no attempt
        if refused:
            self._refused |= attempt.blamed
            await self._back_off()
        elif too_small:
            self._too_small |= attempt.blamed
        elif leaves:
            # No fault of anybody's, so no attempt is used up: there are only so many
            # workers to leave.
            assert attempt.blamed, "nobody is leaving"
            self._left |= attempt.blamed
        elif is_free:
            # It may have been dead before it was asked, as all that one event has taken along.
            # A request that kills its workers by itself ends all the same.
            self._num_unheard += 1
            self._failed |= attempt.blamed
            await self._pause()
        else:
            self._number += 1
            self._failed |= attempt.blamed

    def _check_attempts_left(self, error: BatonError) -> None:
        """Raises ``error`` where there is no other attempt."""
        if not error.retriable:
            raise error
        num_attempts = self._number + 1
        if num_attempts >= self._serving.max_attempts:
            raise type(error)(
                f"{error.message} (attempt {num_attempts} of {num_attempts}; the request may be "
                "sent again)",
                retry_after_s=error.retry_after_s,
            )

    def _another_holds(self, attempt: Attempt) -> bool:
        """There is a decode worker besides those that the attempt is blamed on."""
        assert attempt.blamed, "nobody has refused"
        return any(worker.epoch not in attempt.blamed for worker in self._able("decode"))

    async def _back_off(self) -> None:
        """Where a whole pool has refused: waits, then asks again."""
        roles: tuple[Role, ...] = ("prefill", "decode")
        if not any(
            (workers := self._candidates(role)) and all(w.epoch in self._refused for w in workers)
            for role in roles
        ):
            return
        await self._pause()
        self._refused.clear()

    async def _pause(self) -> None:
        """Waits a little, longer each time."""
        until = self._loop.time() + self._pause_s * self._serving.rng.uniform(0.5, 1.5)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        while self._loop.time() < until:
            await self._wait(until)
