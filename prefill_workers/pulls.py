"""What a prefill worker pulls of its jobs' inputs from the decode workers that hold it.

1. PULLING: all blocks of the job are taken, the receiver fills those that decode lends.
2. Whole: the job is computed on from there.
3. Given up (not connected yet, refused, failed, or later than computing would be): the job goes
   back to the line and is computed; the blocks that were to be filled are in quarantine.
4. Drained: nothing writes those any more.

All of it happens on the engine thread; ``puller`` is called on the event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from baton.worker.inbox import Inbox
from engine.kv_cache.kv_cache import KvCache
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from prefill_workers.pull_costs import PullCosts
from prefill_workers.scheduler import PrefillJob, PrefillScheduler


@dataclass(frozen=True, slots=True, eq=False)
class _Pull:
    job: PrefillJob
    num_tokens: int
    began_at: float


class Pulls:
    """Those of one worker. ``puller`` is called back by ``whole``, ``failed`` and ``drained``."""

    def __init__(
        self,
        kv: KvCache,
        puller: KvReceiver,
        inbox: Inbox,
        *,
        scheduler: PrefillScheduler,
        costs: PullCosts,
    ) -> None:
        self._kv = kv
        self._puller = puller
        self._inbox = inbox
        self._scheduler = scheduler
        self.costs = costs
        self._pulls: dict[TransferKey, _Pull] = {}
        self._quarantined: dict[TransferKey, list[int]] = {}

    def __len__(self) -> int:
        """Those that may still write into the pool."""
        return len(self._pulls) + len(self._quarantined)

    def begin(self, job: PrefillJob) -> None:
        """The scheduler has made the job PULLING."""
        assert job.lender is not None
        start, end = job.sequence.num_shared_tokens, job.num_held_tokens
        size, pull = self._kv.layout.block_size, job.transfer.way_back
        self._pulls[pull] = _Pull(job, end - start, time.monotonic())
        begin = partial(
            self._puller.begin,
            address=job.lender.address,
            source_worker_id=job.lender.worker_id,
            start_token=start,
            num_tokens=end,
            block_ids=job.sequence.block_table[start // size : end // size],
            within_s=self.costs.patience_s(end - start),
        )
        self._inbox.call(begin, pull)

    def whole(self, transfer: TransferKey, at: float) -> PrefillJob | None:
        """Every byte is there since ``at``, on the monotonic clock: PULLING → RUNNING. None
        where the job has ended meanwhile."""
        pull = self._pulls.pop(transfer, None)
        if pull is None:
            self.drained(transfer)
            return None
        self.costs.moved(pull.num_tokens, at - pull.began_at, transfer.source_epoch)
        self._kv.adopt_prefix(pull.job.sequence, pull.job.num_held_tokens)
        self._scheduler.pulled(pull.job, pull.num_tokens)
        return pull.job

    def failed(self, transfer: TransferKey, at: float) -> None:
        """It never becomes whole: PULLING → QUEUED, to be computed."""
        pull = self._pulls.get(transfer)
        if pull is None:
            return
        if at - pull.began_at >= self.costs.patience_s(pull.num_tokens):
            self.costs.late(pull.num_tokens, transfer.source_epoch)
        self._abandon(transfer)
        self._scheduler.requeue(pull.job)

    def cancel(self, job: PrefillJob) -> None:
        """The job has ended; if it is PULLING, its blocks are not its own any more."""
        transfer = job.transfer.way_back
        if transfer in self._pulls:
            self._abandon(transfer)
            self._inbox.call(self._puller.cancel, transfer)

    def drained(self, transfer: TransferKey) -> None:
        """Nothing writes its blocks any more."""
        blocks = self._quarantined.pop(transfer, None)
        if blocks is not None:
            self._kv.pool.end_quarantine(blocks)

    def _abandon(self, transfer: TransferKey) -> None:
        job = self._pulls.pop(transfer).job
        self._quarantined[transfer] = self._kv.quarantine(job.sequence, job.num_held_tokens)
