"""What a prefill worker computes next: chunks of the jobs that run, in every step.

A job is

1. WAITING for the decode side's reservation; it does not block others;
2. QUEUED once the gateway says Proceed;
3. RUNNING from the step that takes all its blocks, so that two half-computed
   prompts can never wait for each other's room; before that PULLING, with all its blocks,
   where decode lends some of what it lacks: QUEUED again, and first among equals, where
   that comes to nothing;
4. LEASED when its input is computed and its blocks belong to the hand-off.

Jobs begin to run in order of priority, the lower first, and equal ones in order of arrival:
one that waits for blocks is passed by better priorities alone, or short ones could keep it
waiting for ever. Who runs keeps its blocks. ``engine/chunked_prefill.py`` says how those that
run share a step.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from baton.worker.outbox import InputUse
from baton.worker.session_server import StreamKey
from engine.chunked_prefill import prefill_chunks
from engine.intake import StopRule
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Scheduled, Sequence
from kv_transfer.keys import TransferKey

_PRIORITY = attrgetter("priority")


class JobState(enum.Enum):
    WAITING = enum.auto()
    QUEUED = enum.auto()
    PULLING = enum.auto()
    RUNNING = enum.auto()
    LEASED = enum.auto()


@dataclass(frozen=True, slots=True)
class Lender:
    """A job's decode worker, as one that may be pulled from."""

    worker_id: str
    address: str
    """``host:port`` of its Transfer service."""


@dataclass(slots=True, eq=False)
class PrefillJob:
    """One attempt of one choice, as this worker sees it."""

    key: StreamKey
    request_id: str
    sequence: Sequence
    stop: StopRule
    transfer: TransferKey
    deadline: float
    """On the monotonic clock, seconds."""
    priority: int = 0
    state: JobState = JobState.WAITING
    num_held_tokens: int = 0
    """Leading tokens that decode already holds."""
    lender: Lender | None = None
    """None: nothing is pulled, or not any more."""
    num_pulled_tokens: int = 0
    num_uncached_tokens: int = 0
    """Of the input, what neither the prefix cache has nor is to be pulled, as it stood when
    the job was last looked at: when it came, and when it was queued."""
    use: InputUse = field(default_factory=InputUse)

    @property
    def num_left(self) -> int:
        """Tokens that it has yet to compute, if it is RUNNING or PULLING."""
        num_tokens = self.sequence.num_tokens
        if self.state is JobState.PULLING:
            return num_tokens - min(self.num_held_tokens, num_tokens - 1)
        return self.sequence.num_remaining


class PrefillScheduler:
    """Owns the order of jobs; the block pool is the cache's. ``moving_pays`` says whether so
    many tokens are pulled from the decode process of that epoch rather than computed."""

    def __init__(
        self,
        kv: KvCache,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        moving_pays: Callable[[int, bytes], bool] = lambda num_tokens, lender: False,
    ) -> None:
        self._kv = kv
        self._moving_pays = moving_pays
        self._budget = max_num_batched_tokens
        self._max_running = max_num_seqs
        self._waiting: dict[StreamKey, PrefillJob] = {}
        self._queued: OrderedDict[StreamKey, PrefillJob] = OrderedDict()
        self._running: OrderedDict[StreamKey, PrefillJob] = OrderedDict()  # or PULLING

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_tokens_to_compute(self) -> int:
        """Input tokens still to compute; of a job that does not run yet, those that were
        not cached or to be pulled when it was last looked at."""
        running = sum(job.num_left for job in self._running.values())
        later = (*self._waiting.values(), *self._queued.values())
        return running + sum(job.num_uncached_tokens for job in later)

    def add(self, job: PrefillJob) -> None:
        """Counts a job that is WAITING: its work is bound to come."""
        self._waiting[job.key] = job
        self._look_up(job)

    def enqueue(self, job: PrefillJob) -> None:
        """WAITING → QUEUED."""
        self._waiting.pop(job.key, None)
        job.state = JobState.QUEUED
        self._look_up(job)
        self._queued[job.key] = job

    def _look_up(self, job: PrefillJob) -> None:
        num_tokens = job.sequence.num_tokens
        num_there = self._kv.num_cached_prefix(job.sequence)
        if self._is_to_pull(job, num_there):
            num_there = job.num_held_tokens
        job.num_uncached_tokens = num_tokens - min(num_there, num_tokens - 1)

    def _is_to_pull(self, job: PrefillJob, num_cached: int) -> bool:
        if job.lender is None:
            return False
        num_lacking = job.num_held_tokens - num_cached
        return self._moving_pays(num_lacking, job.transfer.destination_epoch)

    def remove(self, job: PrefillJob) -> None:
        """Forgets a job in any state; its blocks stay the caller's business."""
        for jobs in (self._waiting, self._queued, self._running):
            jobs.pop(job.key, None)

    def schedule(self) -> tuple[list[Scheduled], list[PrefillJob]]:
        """Chunks for one step within the token budget, and the jobs of which more is cached
        than before: those that it admits, and those that another has computed a part of. The
        pull of those that are PULLING now is to begin."""
        grown = [job for job in self._computing() if self._kv.extend_prefix(job.sequence)]
        admitted = self._admit()
        sequences = [job.sequence for job in sorted(self._computing(), key=_PRIORITY)]
        return prefill_chunks(sequences, self._budget, self._kv), grown + admitted

    def _computing(self) -> list[PrefillJob]:
        return [job for job in self._running.values() if job.state is JobState.RUNNING]

    def _admit(self) -> list[PrefillJob]:
        """QUEUED → RUNNING or PULLING, in order, while blocks for the whole input are to be
        had."""
        admitted: list[PrefillJob] = []
        while self._queued and len(self._running) < self._max_running:
            job = min(self._queued.values(), key=_PRIORITY)  # of equal ones the oldest
            self._kv.hold_prefix(job.sequence)
            if not self._kv.ensure_blocks(job.sequence, job.sequence.num_tokens):
                self._kv.free(job.sequence)
                break
            del self._queued[job.key]
            is_to_pull = self._is_to_pull(job, job.sequence.num_shared_tokens)
            job.state = JobState.PULLING if is_to_pull else JobState.RUNNING
            self._running[job.key] = job
            admitted.append(job)
        return admitted

    def pulled(self, job: PrefillJob, num_tokens: int) -> None:
        """PULLING → RUNNING: what decode holds is here too."""
        job.num_pulled_tokens = num_tokens
        job.state = JobState.RUNNING

    def requeue(self, job: PrefillJob) -> None:
        """PULLING → QUEUED: it will be computed, and comes first among equals. The caller has
        taken its blocks away."""
        del self._running[job.key]
        job.lender = None
        self.enqueue(job)
        self._queued.move_to_end(job.key, last=False)

    def finish(self, job: PrefillJob) -> None:
        """RUNNING → LEASED: the input is computed."""
        del self._running[job.key]
        job.state = JobState.LEASED
