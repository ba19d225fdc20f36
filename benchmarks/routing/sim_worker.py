"""A worker in simulated time: real scheduler, block pool, prefix cache and cache feed.

Only the model is missing: a step takes as long as ``Speeds`` says, and the token that it
draws is the next one of the answer that the request is known to get.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from baton.block_hash import HashDomain
from baton.kv_layout import KvLayout
from baton.protocol import PROTOCOL_VERSION
from baton.records import Role, WorkerRecord
from baton.v1 import session_pb2 as pb
from baton.worker.cache_feed import CacheFeed
from decode_workers.scheduler import DecodeScheduler, DecodeStream, StreamState
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Scheduled
from prefill_workers.pull_costs import MIN_BLOCKS
from prefill_workers.scheduler import PrefillJob, PrefillScheduler
from router.workers.given_work import GivenWork
from router.workers.session import WorkerSession

KV_DTYPE = "float32"
_SESSION = 1


@dataclass(frozen=True, slots=True)
class Speeds:
    """How long things take, in seconds."""

    token_s: float
    """Of prefill."""
    chunk_s: float
    """Of a step in which nothing decodes, besides its tokens."""
    step_s: float
    """Of any other step, besides its tokens."""
    row_s: float
    """Of a decoding stream's token in a step."""
    transfer_token_s: float
    message_s: float = 0.003
    report_s: float = 0.5


SMALL_CPU = Speeds(token_s=2e-3, chunk_s=0.02, step_s=0.025, row_s=5e-3, transfer_token_s=1e-5)
"""SmolLM2-135M at fp32 on half a core or one, as four workers on two cores have it."""
ACCELERATOR = Speeds(
    token_s=32 * 5e-5, chunk_s=0.01, step_s=32 * 0.02, row_s=32 * 2e-4, transfer_token_s=32 * 5e-6
)
"""An 8B model on one large GPU, with tokens that stand for 32 each."""


class SimSession:
    """What a policy sees of a worker."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record
        self.kv_dtype = KV_DTYPE
        self.epoch = bytes.fromhex(record.epoch)
        self.report: pb.Report | None = None
        self.load_at: float | None = None
        self.num_open = 0
        self.given = GivenWork()

    @property
    def num_sequences(self) -> int:
        return self.num_open

    def opened(self, stream_id: int, num_tokens: int) -> None:
        self.num_open += 1
        self.given.opened(stream_id, -(-num_tokens // self.record.block_size))

    def computed(self, stream_id: int) -> None:
        self.given.computed(stream_id)

    def ended(self, stream_id: int) -> None:
        self.num_open -= 1
        self.given.ended(stream_id)

    def take(self, report: pb.Report, load_at: float) -> None:
        """A report has come; its counts were taken at ``load_at``."""
        self.report = report
        self.load_at = load_at
        self.given.reported(report.num_opens)

    def as_session(self) -> WorkerSession:
        return cast(WorkerSession, self)


def _record(worker_id: str, role: Role, num_blocks: int, block_size: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        role=role,
        epoch=random.Random(worker_id).randbytes(16).hex(),
        protocol_version=PROTOCOL_VERSION,
        generation="0",
        address="",
        metrics_address="",
        model="",
        digest="",
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=1 << 30,
        pid=1,
        host="",
        started_at=0.0,
    )


class SimWorker:
    """Between steps it acts on what was posted, as an engine thread does.

    ``after(delay_s, callback)`` is the simulation's clock work; ``tell`` takes cache
    events, ``emit`` a computed sequence that needs its next token."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        *,
        num_blocks: int,
        block_size: int,
        domain: HashDomain,
        speeds: Speeds,
        clock: Callable[[], float],
        after: Callable[[float, Callable[[], None]], None],
        tell: Callable[[bytes, pb.CacheEvents], None],
    ) -> None:
        self.role = role
        self.session = SimSession(_record(worker_id, role, num_blocks, block_size))
        layout = KvLayout(num_blocks, 1, 1, block_size, 1, "float32")
        self.kv = KvCache(layout, memoryview(bytearray(layout.num_bytes)), domain)
        self.kv.pool.watch()
        self.prefill = PrefillScheduler(
            self.kv,
            max_num_batched_tokens=512,
            max_num_seqs=64,
            moving_pays=lambda num_tokens, lender: num_tokens >= MIN_BLOCKS * block_size,
        )
        self.decode = DecodeScheduler(
            self.kv,
            max_num_batched_tokens=512,
            max_num_seqs=64,
            watermark_blocks=max(1, num_blocks // 100),
        )
        self.receive: Callable[[DecodeStream], None] = lambda stream: None
        self.begun: Callable[[PrefillJob], None] = lambda job: None
        self.computed: Callable[[Scheduled], None] = lambda chunk: None
        self._speeds = speeds
        self._clock = clock
        self._after = after
        self._busy = False
        self._commands: list[Callable[[], None]] = []
        self._num_opens = 0
        self._load = (pb.Report(), clock())
        self._epoch = self.session.epoch
        self._feed = CacheFeed(lambda _, message: tell(self._epoch, message.cache_events))
        self._feed.join(_SESSION)

    def open(self, command: Callable[[], None]) -> None:
        """Posts what an Open asks for."""

        def take_up() -> None:
            self._num_opens += 1
            command()

        self.post(take_up)

    def post(self, command: Callable[[], None]) -> None:
        """Has the worker act before its next step, at once where none is under way."""
        self._commands.append(command)
        if not self._busy:
            self._round()

    def _round(self) -> None:
        """What has been posted, then a step, if there is something to compute."""
        commands, self._commands = self._commands, []
        for command in commands:
            command()
        chunks = self._prefill_chunks() if self.role == "prefill" else self._decode_chunks()
        self.tell_changes()
        self._set_load()
        self._busy = bool(chunks)
        if not chunks:
            return
        num_rows = sum(chunk.num_tokens == 1 for chunk in chunks)
        num_tokens = sum(chunk.num_tokens for chunk in chunks) - num_rows
        speeds = self._speeds
        duration_s = speeds.step_s if num_rows else speeds.chunk_s
        duration_s += num_tokens * speeds.token_s + num_rows * speeds.row_s
        self._after(duration_s, lambda: self._finish(chunks))

    def _prefill_chunks(self) -> list[Scheduled]:
        chunks, admitted = self.prefill.schedule()
        for job in admitted:
            self.begun(job)
        return chunks

    def _decode_chunks(self) -> list[Scheduled]:
        for stream in self.decode.admit():
            if stream.state is StreamState.RECEIVING:
                self.receive(stream)
        return self.decode.schedule()

    def _finish(self, chunks: list[Scheduled]) -> None:
        for chunk in chunks:
            chunk.seq.num_computed_tokens += chunk.num_tokens
            self.kv.publish(chunk.seq)
        for chunk in chunks:
            self.computed(chunk)
        self._round()

    def tell_changes(self) -> None:
        changes = self.kv.pool.take_changes()
        if changes:
            self._feed.change(changes)

    def _set_load(self) -> None:
        counts, is_prefill = self.kv.pool.counts(), self.role == "prefill"
        scheduler = self.prefill if is_prefill else self.decode
        report = pb.Report(
            num_running=scheduler.num_running,
            num_waiting=self.prefill.num_queued if is_prefill else self.decode.num_waiting,
            num_waiting_tokens=scheduler.num_tokens_to_compute,
            blocks=pb.BlockCounts(
                free=counts.free, cached=counts.cached, referenced=counts.referenced
            ),
            num_opens=self._num_opens,
        )
        self._load = (report, self._clock())

    def report(self) -> None:
        """Has the gateway hear how it stood when a step last began or ended."""
        self._after(self._speeds.message_s, partial(self.session.take, *self._load))
