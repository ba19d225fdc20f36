"""What a decode worker computes next: decode first, then local prefill in chunks.

A stream is

1. QUEUED: it has no blocks, and waits for room (a reservation, or a local prefill);
2. RECEIVING: its blocks are reserved and the hand-off fills them;
3. RUNNING: it is in the batch, decoding or prefilling here;
4. ENDED.

Room for tokens still to come is taken as decode goes. When it runs out, of the streams
of the worst priority (the highest number) the one that was admitted last gives its blocks
up and goes back to QUEUED, to be recomputed here (prompt and emitted tokens): the oldest
of the best priority always gets on, so the pool cannot lock up. RECEIVING streams are never
preempted: their blocks have writes in flight. Nobody is preempted for one that is QUEUED.

Who is QUEUED waits in one line: streams that have begun before all others, whatever their
priorities. They were preempted, or their Open brings tokens of another worker's: a client
is watching. Each part of the line is in order of priority; among equals preempted streams
come first, and then it is the order of arrival. Among equal priorities nobody starves. A
begun stream was once admitted from among the others, on some worker, and comes here because
that worker was lost, is leaving, or let it wait for room: at most ``gateway.max_attempts``
times, once for each worker that leaves, or every few seconds until its deadline. So those
that pass a waiting stream are no more than the gateways had running elsewhere, and each
ends after its ``max_tokens``; while no worker goes, nobody is passed. Better priorities
may pass a stream for as long as they keep coming, until its deadline.
"""

from __future__ import annotations

import enum
from bisect import insort_left, insort_right
from dataclasses import dataclass, field
from operator import attrgetter

from baton.v1 import session_pb2 as pb
from baton.worker.outbox import InputUse
from baton.worker.session_server import StreamKey
from engine.chunked_prefill import prefill_chunks
from engine.intake import StopRule
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Scheduled, Sequence
from kv_transfer.keys import TransferKey

_PRIORITY = attrgetter("priority")


class StreamState(enum.Enum):
    QUEUED = enum.auto()
    RECEIVING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


@dataclass(slots=True, eq=False)
class DecodeStream:
    """One attempt of one choice, as this worker sees it."""

    key: StreamKey
    request_id: str
    sequence: Sequence
    stop: StopRule
    deadline: float
    """On the monotonic clock, seconds."""
    transfer: TransferKey | None
    """None: this worker prefills by itself."""
    handoff: pb.Handoff | None
    queued_at: float
    priority: int = 0
    state: StreamState = StreamState.QUEUED
    num_input_tokens: int = 0
    """Prompt and tokens emitted by earlier attempts."""
    use: InputUse = field(default_factory=InputUse)
    num_cached_tokens: int | None = None
    """Of the input, found in the prefix cache when it was first admitted."""
    computed: list[range] = field(default_factory=list)
    """Positions of the input that were computed here, for it; some twice, where it was
    preempted."""
    counted: bool = False
    """Its input is there, and has been counted."""

    @property
    def local_use(self) -> InputUse:
        """Of a local prefill: what was never computed for it came from the prefix cache."""
        num_computed = end = 0
        for each in sorted(self.computed, key=attrgetter("start")):
            num_computed += max(0, each.stop - max(end, each.start))
            end = max(end, each.stop)
        return InputUse(self.num_input_tokens - num_computed, num_computed)


class DecodeScheduler:
    """Owns the queue and the batch; the block pool is the cache's."""

    def __init__(
        self, kv: KvCache, *, max_num_batched_tokens: int, max_num_seqs: int, watermark_blocks: int
    ) -> None:
        self._kv = kv
        self._budget = max_num_batched_tokens
        # Each takes a token of every step, and one is left for a local prefill: nobody stands
        # still because others run.
        self.max_running = max(1, min(max_num_seqs, max_num_batched_tokens - 1))
        self._watermark = watermark_blocks
        self._begun: list[DecodeStream] = []  # the next one first, as in the other line
        self._fresh: list[DecodeStream] = []
        self._running: list[DecodeStream] = []  # in order of admission
        self._num_receiving = 0
        self.num_preemptions = 0

    @property
    def queued(self) -> tuple[DecodeStream, ...]:
        """All that wait for room, the next one first."""
        return (*self._begun, *self._fresh)

    @property
    def num_running(self) -> int:
        """Streams that have their blocks, whether a hand-off fills them or they decode."""
        return len(self._running) + self._num_receiving

    @property
    def num_waiting(self) -> int:
        """Streams that wait for room."""
        return len(self._begun) + len(self._fresh)

    @property
    def num_tokens_to_compute(self) -> int:
        """Input tokens still to compute here, queued local prefills counted whole."""
        local = [s for s in self.queued if s.transfer is None]
        return sum(s.sequence.num_remaining for s in [*local, *self._running])

    def enqueue(self, stream: DecodeStream) -> None:
        line = self._begun if stream.sequence.num_emitted_tokens > 0 else self._fresh
        insort_right(line, stream, key=_PRIORITY)

    def remove(self, stream: DecodeStream) -> None:
        """→ ENDED, from any state; its blocks stay the caller's business."""
        if stream.state is StreamState.QUEUED:
            line = self._begun if stream in self._begun else self._fresh
            line.remove(stream)
        elif stream.state is StreamState.RECEIVING:
            self._num_receiving -= 1
        elif stream.state is StreamState.RUNNING:
            self._running.remove(stream)
        stream.state = StreamState.ENDED

    def received(self, stream: DecodeStream) -> None:
        """RECEIVING → RUNNING."""
        self._num_receiving -= 1
        self._run(stream)

    def _run(self, stream: DecodeStream) -> None:
        stream.state = StreamState.RUNNING
        self._running.append(stream)

    def admit(self) -> list[DecodeStream]:
        """QUEUED → RECEIVING or RUNNING, in order, while there is room above the watermark.

        Returns the streams that were admitted for the first time; the hand-off of those
        that are RECEIVING is to begin.
        """
        admitted: list[DecodeStream] = []
        while (line := self._begun or self._fresh) and self.num_running < self.max_running:
            stream = line[0]
            if not self._take_blocks(stream.sequence):
                break
            line.pop(0)
            if stream.num_cached_tokens is None:
                # A fully cached input still has its last token computed.
                num_cached = stream.sequence.num_cached_tokens
                stream.num_cached_tokens = min(num_cached, stream.num_input_tokens - 1)
                admitted.append(stream)
            if stream.transfer is None:
                self._run(stream)
            else:
                stream.state = StreamState.RECEIVING
                self._num_receiving += 1
        return admitted

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for the whole input, leaving the watermark free while others run."""
        others = self.num_running
        self._kv.hold_prefix(sequence)
        counts = self._kv.pool.counts()
        needed = self._kv.layout.num_blocks_for(sequence.num_tokens) - len(sequence.block_table)
        room = counts.free + counts.cached - needed >= (self._watermark if others else 0)
        if room and self._kv.ensure_blocks(sequence, sequence.num_tokens):
            return True
        self._kv.free(sequence)
        return False

    def schedule(self) -> list[Scheduled]:
        """Chunks for one step: every decoding stream one token; local prefills share what
        is left of the budget. Better priorities come first, the oldest among equals."""
        for stream in sorted(self._running, key=_PRIORITY):
            if stream.state is StreamState.RUNNING and stream.sequence.num_remaining == 1:
                self._make_room(stream)
        for stream in self._running:
            if stream.sequence.num_remaining > 1:  # others may have computed some of it meanwhile
                self._kv.extend_prefix(stream.sequence)
        running = [stream.sequence for stream in sorted(self._running, key=_PRIORITY)]
        decoding = [seq for seq in running if seq.num_remaining == 1]
        prefilling = [seq for seq in running if seq.num_remaining > 1]
        chunks = [Scheduled(sequence, 1) for sequence in decoding]
        chunks += prefill_chunks(prefilling, self._budget - len(decoding), self._kv)
        self._note_computed(chunks)
        return chunks

    def _note_computed(self, chunks: list[Scheduled]) -> None:
        uncounted = {id(s.sequence): s for s in self._running if not s.counted}
        for chunk in chunks:
            if (stream := uncounted.get(id(chunk.seq))) is not None:
                first = chunk.seq.num_computed_tokens
                stream.computed.append(range(first, first + chunk.num_tokens))

    def _make_room(self, stream: DecodeStream) -> None:
        """A block for the stream's next token, preempting from the worst priority's youngest
        on."""
        while not self._kv.ensure_blocks(stream.sequence, stream.sequence.num_tokens):
            victim = max(reversed(self._running), key=_PRIORITY)
            self._preempt(victim)
            if victim is stream:
                return

    def _preempt(self, victim: DecodeStream) -> None:
        """RUNNING → QUEUED, first among equals in line, to be recomputed by this worker."""
        self._running.remove(victim)
        self._kv.free(victim.sequence)
        victim.transfer = None
        victim.state = StreamState.QUEUED
        insort_left(self._begun, victim, key=_PRIORITY)
        self.num_preemptions += 1
