"""The prefill loop: computes prompts, samples the first token, offers the KV.

Everything here runs on the engine thread, between or in its steps. A job's
blocks are given back in one place, ``_freed``, which the hand-off calls exactly
once per offer, when nobody reads them any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from baton.config import EngineConfig
from baton.errors import (
    BatonError,
    CancelledError,
    DeadlineExceededError,
    DrainingError,
    OverloadedError,
    TransferError,
)
from baton.faults import Faults
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2 as pb
from baton.worker.inbox import Inbox
from baton.worker.outbox import InputUse, Load, Outbox
from baton.worker.session_server import StreamKey
from engine.engine import Engine
from engine.sequence import Sampled, Scheduled
from kv_transfer.keys import TransferKey
from kv_transfer.service import KvSender
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import JobState, PrefillJob, PrefillScheduler

logger = logging.getLogger(__name__)

RELEASED = "released"
_WAITING = (JobState.WAITING, JobState.QUEUED)


class PrefillWorker:
    """Owns all jobs of this process. ``sender`` is called on the event loop only, and so is
    what ``pulls`` receives with."""

    def __init__(
        self,
        *,
        engine: Engine,
        scheduler: PrefillScheduler,
        sender: KvSender,
        pulls: Pulls,
        inbox: Inbox,
        outbox: Outbox,
        metrics: WorkerMetrics,
        faults: Faults,
        config: EngineConfig,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._sender = sender
        self._pulls = pulls
        self._inbox = inbox
        self._outbox = outbox
        self._metrics = metrics
        self._faults = faults
        self._config = config
        self._jobs: dict[StreamKey, PrefillJob] = {}
        self._offers: dict[TransferKey, PrefillJob] = {}
        self._num_steps = 0
        self._draining = False

    # ------------------------------------------------------------- commands

    def open(self, job: PrefillJob) -> None:
        """Takes a job that waits for Proceed, or refuses it."""
        self._outbox.opened(job.key)
        if job.key in self._jobs:
            logger.error("request %s: its stream id is in use; ignored", job.request_id)
        elif self._draining:
            self._outbox.failed(job.key, DrainingError("this prefill worker is going away"))
        elif len(self._jobs) >= self._config.max_num_seqs + self._config.max_waiting:
            self._outbox.failed(job.key, OverloadedError("this prefill worker's queue is full"))
        else:
            self._jobs[job.key] = job
            self._scheduler.add(job)

    def proceed(self, key: StreamKey, num_held_tokens: int) -> None:
        """The decode side has its blocks: queue the job and offer its transfer."""
        job = self._jobs.get(key)
        if job is None or job.state is not JobState.WAITING:
            return
        self._faults.hit("prefill.proceed")
        job.num_held_tokens = num_held_tokens
        self._offers[job.transfer] = job
        self._on_loop(
            self._sender.offer,
            job.transfer,
            start_token=num_held_tokens,
            num_tokens=job.sequence.num_tokens,
        )
        self._scheduler.enqueue(job)

    def cancel(self, key: StreamKey) -> None:
        """Ends a job in any state; unknown keys are late cancels and do nothing."""
        job = self._jobs.get(key)
        if job is not None:
            self._end(job, CancelledError("cancelled by the gateway"))
            self._outbox.closed(key, pb.CLOSE_REASON_CANCELLED)

    def session_lost(self, session: int) -> None:
        """Ends every job of a gateway that has gone."""
        self._outbox.session_lost(session)
        for key in [key for key in self._jobs if key.session == session]:
            self._end(self._jobs[key], CancelledError("the gateway's Session was lost"))

    def freed(self, transfer: TransferKey, outcome: str) -> None:
        """The hand-off is over: nobody reads the job's blocks any more."""
        self._faults.hit("prefill.freed")
        job = self._offers.pop(transfer, None)
        if job is None:
            return
        self._give_blocks_back(job)
        if self._jobs.pop(job.key, None) is None:
            return  # it was ended before, and has been answered
        self._scheduler.remove(job)
        if outcome == RELEASED:
            self._outbox.closed(job.key, pb.CLOSE_REASON_HANDED_OFF, job.use)
        else:
            self._outbox.failed(job.key, TransferError(f"the hand-off ended: {outcome}"))

    def pulled(self, transfer: TransferKey, at: float) -> None:
        """What decode lent is here, since ``at`` on the monotonic clock."""
        job = self._pulls.whole(transfer, at)
        if job is not None:
            self._announce_cached(job)

    def drain(self) -> None:
        """Admits nothing more."""
        self._draining = True

    @property
    def idle(self) -> bool:
        """No job, no offer and no pull is left. Read by other threads: a hint, no promise."""
        return not self._jobs and not self._offers and not self._pulls

    def fail_all(self, error: BatonError) -> None:
        """Answers every job with ``error``."""
        for job in list(self._jobs.values()):
            self._end(job, error)
            self._outbox.failed(job.key, error)

    def _end(self, job: PrefillJob, error: BatonError) -> None:
        """Forgets a job; its blocks go back at once, or when its hand-off lets them."""
        del self._jobs[job.key]
        self._scheduler.remove(job)
        if job.transfer in self._offers:
            self._pulls.cancel(job)
            self._on_loop(self._sender.abort, job.transfer, error)
        else:
            self._give_blocks_back(job)

    def _give_blocks_back(self, job: PrefillJob) -> None:
        self._pulls.cancel(job)
        self._engine.kv.free(job.sequence)

    def _on_loop(self, method: Callable[..., None], *args: object, **kwargs: object) -> None:
        self._inbox.call(partial(method, *args, **kwargs))

    # ----------------------------------------------------------------- step

    def step(self) -> bool:
        """One engine step over the scheduled chunks. False: there was nothing to do."""
        self._expire(time.monotonic())
        chunks, grown = self._scheduler.schedule()
        for job in grown:
            if job.state is JobState.PULLING:
                self._pulls.begin(job)
            else:
                self._announce_cached(job)
        if chunks:
            self._outbox.flush()  # what commands had to say does not wait for the step
            self._outbox.set_load(self._load())
            began = time.perf_counter()
            self._faults.hit("prefill.chunk")
            sampled = self._engine.step(chunks)
            took_s = time.perf_counter() - began
            self._metrics.step_seconds.observe(took_s)
            self._pulls.costs.computed(sum(chunk.num_tokens for chunk in chunks), took_s)
            self._metrics.steps.inc()
            self._num_steps += 1
            self._announce(chunks)
            for result in sampled:
                self._first_token(result)
        self._outbox.cache_changed(self._engine.kv.pool.take_changes())
        self._outbox.flush()
        self._outbox.set_load(self._load())
        return bool(chunks)

    def _expire(self, now: float) -> None:
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            error = DeadlineExceededError("the request's deadline passed while it prefilled")
            self._end(job, error)
            self._outbox.failed(job.key, error)

    def _announce_cached(self, job: PrefillJob) -> None:
        """Announces what the prefix cache holds of a job, and need not be computed."""
        num_tokens = job.sequence.num_tokens
        num_cached = min(job.sequence.num_cached_tokens, num_tokens - 1)
        num_pulled = min(job.num_pulled_tokens, num_tokens - 1 - num_cached)
        job.use = InputUse(num_cached, num_tokens - num_cached - num_pulled, num_pulled)
        if job.sequence.num_shared_tokens > job.num_held_tokens:
            self._ready(job, job.sequence.num_shared_tokens)

    def _announce(self, chunks: list[Scheduled]) -> None:
        for chunk in chunks:
            assert isinstance(chunk.seq.key, StreamKey)
            job = self._jobs[chunk.seq.key]
            if job.sequence.num_computed_tokens > job.num_held_tokens:
                self._ready(job, job.sequence.num_computed_tokens)

    def _ready(self, job: PrefillJob, end_token: int) -> None:
        num_blocks = self._engine.kv.layout.num_blocks_for(end_token)
        block_ids = job.sequence.block_table[:num_blocks]
        self._on_loop(self._sender.ready, job.transfer, end_token, block_ids)

    def _first_token(self, sampled: Sampled) -> None:
        """RUNNING → LEASED, unless the first token is the last: then nothing moves."""
        assert isinstance(sampled.seq.key, StreamKey)
        job = self._jobs[sampled.seq.key]
        sequence = job.sequence
        num_emitted = sequence.num_tokens - sequence.num_prompt_tokens
        position = num_emitted - 1
        self._scheduler.finish(job)
        self._metrics.output_tokens.inc()
        self._outbox.count_input(job.use)
        self._outbox.token(job.key, position, sampled.token_id, sampled.logprobs)
        reason = job.stop.reason(sampled.token_id, num_emitted)
        if reason is not None:
            self._outbox.closed(job.key, reason, job.use)
            self._end(job, CancelledError("the request ended with its first token"))
            return
        self._on_loop(
            self._sender.commit, job.transfer, sampled.token_id, position, sampled.logprobs
        )

    def _load(self) -> Load:
        counts = self._engine.kv.pool.counts()
        return Load(
            num_steps=self._num_steps,
            num_waiting=sum(job.state in _WAITING for job in self._jobs.values()),
            num_running=self._scheduler.num_running,
            num_waiting_tokens=self._scheduler.num_tokens_to_compute,
            free=counts.free,
            cached=counts.cached,
            referenced=counts.referenced,
            quarantined=counts.quarantined,
            draining=self._draining,
        )
