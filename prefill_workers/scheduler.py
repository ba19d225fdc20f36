"""What a prefill worker computes next: chunks of the jobs that run, in every step.

A job is

1. WAITING for the decode side's reservation; it does not block others;
2. QUEUED once the gateway says Proceed;
3. RUNNING from the step that takes all its blocks, so that two half-computed
   prompts can never wait for each other's room;
4. LEASED when its input is computed and its blocks belong to the hand-off.

Jobs begin to run in order of priority, the lower first, and equal ones in order of arrival:
one that waits for blocks is passed by better priorities alone, or short ones could keep it
waiting for ever. Who runs keeps its blocks. ``engine/chunked_prefill.py`` says how those that
run share a step.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
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
    RUNNING = enum.auto()
    LEASED = enum.auto()


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
    num_uncached_tokens: int = 0
    """Of the input, as the prefix cache stood when the job was last looked at: when it
    came, and when it was queued."""
    use: InputUse = field(default_factory=InputUse)


class PrefillScheduler:
    """Owns the order of jobs; the block pool is the cache's."""

    def __init__(self, kv: KvCache, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self._kv = kv
        self._budget = max_num_batched_tokens
        self._max_running = max_num_seqs
        self._waiting: dict[StreamKey, PrefillJob] = {}
        self._queued: OrderedDict[StreamKey, PrefillJob] = OrderedDict()
        self._running: OrderedDict[StreamKey, PrefillJob] = OrderedDict()

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_tokens_to_compute(self) -> int:
        """Input tokens still to compute; of a job that does not run yet, those that were
        not cached when it was last looked at."""
        running = sum(job.sequence.num_remaining for job in self._running.values())
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
        num_cached = self._kv.num_cached_prefix(job.sequence)
        job.num_uncached_tokens = num_tokens - min(num_cached, num_tokens - 1)

    def remove(self, job: PrefillJob) -> None:
        """Forgets a job in any state; its blocks stay the caller's business."""
        for jobs in (self._waiting, self._queued, self._running):
            jobs.pop(job.key, None)

    def schedule(self) -> tuple[list[Scheduled], list[PrefillJob]]:
        """Chunks for one step within the token budget, and the jobs of which more is cached
        than before: those that it admits, and those that another has computed a part of."""
        grown = [job for job in self._running.values() if self._kv.extend_prefix(job.sequence)]
        admitted = self._admit()
        sequences = [job.sequence for job in sorted(self._running.values(), key=_PRIORITY)]
        return prefill_chunks(sequences, self._budget, self._kv), grown + admitted

    def _admit(self) -> list[PrefillJob]:
        """QUEUED → RUNNING, in order, while blocks for the whole input are to be had."""
        admitted: list[PrefillJob] = []
        while self._queued and len(self._running) < self._max_running:
            job = min(self._queued.values(), key=_PRIORITY)  # of equal ones the oldest
            self._kv.hold_prefix(job.sequence)
            if not self._kv.ensure_blocks(job.sequence, job.sequence.num_tokens):
                self._kv.free(job.sequence)
                break
            del self._queued[job.key]
            job.state = JobState.RUNNING
            self._running[job.key] = job
            admitted.append(job)
        return admitted

    def finish(self, job: PrefillJob) -> None:
        """RUNNING → LEASED: the input is computed."""
        del self._running[job.key]
        job.state = JobState.LEASED
