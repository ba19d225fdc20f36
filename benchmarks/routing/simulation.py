"""Chats against simulated workers, with the real routing policy and KV index.

Time is simulated, so minutes of chat take a second, and a seed gives the same result
every time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from baton.config import RoutingConfig
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from benchmarks.routing.oracle import Asked
from benchmarks.routing.sim_worker import KV_DTYPE, SMALL_CPU, SimWorker, Speeds
from decode_workers.scheduler import DecodeStream
from engine.intake import StopRule
from engine.sampling.params import SamplingParams
from engine.sequence import Scheduled
from engine.sequence import Sequence as EngineSequence
from kv_transfer.keys import TransferKey
from prefill_workers.scheduler import JobState, Lender, PrefillJob
from router.routing.input_hashes import BlockNames, InputHashes
from router.routing.kv_aware import DEFAULT_WEIGHTS, KvAware, Weights
from router.routing.kv_index import KvIndex
from router.routing.policy import NoPeers, make_policy

_STOP = StopRule(1 << 30, frozenset())
"""Not asked: an answer ends where it is known to end."""
_NAMES = BlockNames(secret="simulation", weights_revision="simulation")
_DOMAIN = _NAMES.domain(KV_DTYPE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request that a user sends ``think_s`` after the answer before."""

    think_s: float
    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(slots=True, eq=False)
class Served:
    """One request on its way, and afterwards what became of it. Times are simulated."""

    user: int
    number: int
    turn: Turn
    sent_at: float
    prefill: str | None = None
    decode: str = ""
    num_cached: int = 0
    """Prompt tokens that no worker computed."""
    num_moved: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_at

    @property
    def asked(self) -> Asked:
        return Asked(self.turn.prompt, self.turn.answer)


@dataclass(frozen=True, slots=True)
class Pools:
    """Sizes of what is simulated; blocks are those of one worker."""

    prefill_blocks: int
    decode_blocks: int
    num_prefill: int = 2
    num_decode: int = 2
    block_size: int = 16


def _finish_now(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs what only ever yields to give others their turn."""
    try:
        while True:
            coroutine.send(None)
    except StopIteration:
        pass


@dataclass(slots=True, eq=False)
class _Running:
    """One request on its workers."""

    served: Served
    decode: SimWorker
    prefill: SimWorker | None
    stream: DecodeStream
    job: PrefillJob | None


def _sequence(served: Served, key: StreamKey) -> EngineSequence:
    prompt = list(served.turn.prompt)
    return EngineSequence(key, prompt, len(prompt), SamplingParams(seed=0), _DOMAIN.root())


class Simulation:
    """One gateway and its workers; ``run`` may be called once."""

    def __init__(
        self,
        config: RoutingConfig,
        pools: Pools,
        *,
        speeds: Speeds = SMALL_CPU,
        weights: Weights = DEFAULT_WEIGHTS,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self.index = KvIndex(lambda: self.now)
        self._speeds = speeds
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        rng = random.Random(seed)
        self._policy = make_policy(config, self.index, rng, lambda: self.now)
        if isinstance(self._policy, KvAware):
            self._policy = KvAware(
                config, self.index, rng, lambda: self.now, NoPeers(), weights=weights
            )
        self._pulls = config.prefill_pulls
        self._names = _NAMES if config.policy == "kv_aware" else None
        self._running: dict[Hashable, _Running] = {}
        self._users: Sequence[Sequence[Turn]] = ()
        self._served: list[Served] = []
        self._num_left = 0
        self.workers: dict[str, SimWorker] = {}
        for number in range(pools.num_prefill):
            self._add(f"prefill-{number}", pools.prefill_blocks, pools.block_size)
        for number in range(pools.num_decode):
            self._add(f"decode-{number}", pools.decode_blocks, pools.block_size)

    def _add(self, worker_id: str, num_blocks: int, block_size: int) -> None:
        def tell(epoch: bytes, events: pb.CacheEvents) -> None:
            def take() -> None:
                assert not self.index.take(epoch, events), "the index lost track"

            self._after(self._speeds.message_s, take)

        worker = SimWorker(
            worker_id,
            "prefill" if worker_id.startswith("prefill") else "decode",
            num_blocks=num_blocks,
            block_size=block_size,
            domain=_DOMAIN,
            speeds=self._speeds,
            clock=lambda: self.now,
            after=self._after,
            tell=tell,
        )
        self.index.join(worker.session.epoch, num_blocks=num_blocks)
        worker.receive = self._reserved
        worker.begun = self._begun
        worker.computed = self._prefilled if worker.role == "prefill" else self._decoded
        self.workers[worker_id] = worker

    def _after(self, delay_s: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), callback))

    def run(self, users: Sequence[Sequence[Turn]]) -> list[Served]:
        """Every request, in the order of sending, once all have been answered."""
        self._users = users
        self._num_left = sum(map(len, users))
        for user, turns in enumerate(users):
            if turns:
                self._after(turns[0].think_s, partial(self._send, user, 0))
        self._report()
        while self._num_left:
            self._next_event()
        while self._events:  # what is still under way
            self._next_event()
        return self._served

    def _next_event(self) -> None:
        self.now, _, callback = heapq.heappop(self._events)
        callback()

    def _report(self) -> None:
        for worker in self.workers.values():
            worker.report()
        if self._num_left:
            self._after(self._speeds.report_s, self._report)

    # ------------------------------------------------------------ one request

    def _send(self, user: int, number: int) -> None:
        turn = self._users[user][number]
        served = Served(user, number, turn, self.now)
        self._served.append(served)
        by_session = {worker.session: worker for worker in self.workers.values()}
        sessions = {
            role: [s.as_session() for s, worker in by_session.items() if worker.role == role]
            for role in ("prefill", "decode")
        }
        input_ = InputHashes(self._names)
        _finish_now(input_.prepare(turn.prompt, [*sessions["prefill"], *sessions["decode"]]))
        pairing = self._policy.pick(input_, sessions["prefill"], sessions["decode"])
        assert pairing is not None
        served.decode = pairing.decode.record.worker_id
        served.prefill = pairing.prefill.record.worker_id if pairing.prefill else None
        key = StreamKey(0, next(self._numbers))
        for session in pairing.sessions:
            self.workers[session.record.worker_id].session.opened(key.stream_id, len(turn.prompt))
        self._after(self._speeds.message_s, lambda: self._open(served, key))

    def _open(self, served: Served, key: StreamKey) -> None:
        decode = self.workers[served.decode]
        prefill = self.workers[served.prefill] if served.prefill is not None else None
        transfer = None
        job = None
        if prefill is not None:
            transfer = TransferKey(b"", key.stream_id, prefill.session.epoch, decode.session.epoch)
            job = PrefillJob(key, "", _sequence(served, key), _STOP, transfer, 0.0)
            job.lender = Lender(served.decode, "") if self._pulls else None
        stream = DecodeStream(
            key=key,
            request_id="",
            sequence=_sequence(served, key),
            stop=_STOP,
            deadline=0.0,
            transfer=transfer,
            handoff=None,
            queued_at=self.now,
            num_input_tokens=len(served.turn.prompt),
        )
        self._running[key] = _Running(served, decode, prefill, stream, job)
        if prefill is not None and job is not None:
            prefill.open(partial(prefill.prefill.add, job))
        decode.open(partial(decode.decode.enqueue, stream))

    def _reserved(self, stream: DecodeStream) -> None:
        """Decode has its blocks: prefill is told to proceed, by way of the gateway."""
        run = self._running[stream.key]
        prefill, job = run.prefill, run.job
        assert prefill is not None
        assert job is not None
        job.num_held_tokens = stream.sequence.num_shared_tokens
        proceed = partial(prefill.post, partial(prefill.prefill.enqueue, job))
        self._after(2 * self._speeds.message_s, proceed)

    def _begun(self, job: PrefillJob) -> None:
        """Or, from PULLING on, what decode lends is fetched first."""
        run = self._running[job.key]
        run.served.num_cached = job.sequence.num_computed_tokens
        if job.state is not JobState.PULLING:
            return
        prefill, num_pulled = run.prefill, job.num_held_tokens - job.sequence.num_shared_tokens
        assert prefill is not None
        run.served.num_moved += num_pulled

        def pulled() -> None:
            prefill.kv.adopt_prefix(job.sequence, job.num_held_tokens)
            prefill.prefill.pulled(job, num_pulled)
            run.served.num_cached = job.sequence.num_computed_tokens

        delay_s = num_pulled * self._speeds.transfer_token_s + 2 * self._speeds.message_s
        self._after(delay_s, partial(prefill.post, pulled))

    def _prefilled(self, chunk: Scheduled) -> None:
        """A chunk on a prefill worker; the last one draws the first token."""
        run = self._running[chunk.seq.key]
        if chunk.seq.num_remaining:
            return
        assert run.prefill is not None
        assert run.job is not None
        run.prefill.prefill.finish(run.job)
        run.served.token_times.append(self.now + self._speeds.message_s)
        num_moved = len(run.served.turn.prompt) - run.stream.sequence.num_shared_tokens
        if len(run.served.turn.answer) == 1:
            num_moved = 0
        run.served.num_moved += num_moved
        self._tell(run.prefill.session.computed, chunk.seq.key)
        delay_s = num_moved * self._speeds.transfer_token_s + self._speeds.message_s
        self._after(delay_s, lambda: self._handed_over(run))

    def _tell(self, hears: Callable[[int], None], key: Hashable) -> None:
        """Has the gateway hear of a stream."""
        assert isinstance(key, StreamKey)
        self._after(self._speeds.message_s, partial(hears, key.stream_id))

    def _handed_over(self, run: _Running) -> None:
        prefill, job = run.prefill, run.job
        assert prefill is not None
        assert job is not None

        def free() -> None:
            prefill.kv.free(job.sequence)
            self._tell(prefill.session.ended, job.key)

        prefill.post(free)
        run.decode.post(partial(self._received, run))

    def _received(self, run: _Running) -> None:
        sequence, answer = run.stream.sequence, run.served.turn.answer
        if len(answer) == 1:  # the request ended with its first token: its blocks hold nothing
            run.decode.decode.remove(run.stream)
            self._end(run)
        else:
            run.decode.kv.adopt(sequence, len(run.served.turn.prompt))
            sequence.token_ids.append(answer[0])
            run.decode.decode.received(run.stream)
            self._tell(run.decode.session.computed, run.stream.key)

    def _decoded(self, chunk: Scheduled) -> None:
        """A chunk on a decode worker; one that ends the input draws the next token."""
        if chunk.seq.num_remaining:
            return
        run = self._running[chunk.seq.key]
        served, answer = run.served, run.served.turn.answer
        num_emitted = chunk.seq.num_emitted_tokens
        if num_emitted == 0:
            served.num_cached = run.stream.num_cached_tokens or 0
            self._tell(run.decode.session.computed, chunk.seq.key)
        chunk.seq.token_ids.append(answer[num_emitted])
        served.token_times.append(self.now + self._speeds.message_s)
        if num_emitted + 1 == len(answer):
            run.decode.decode.remove(run.stream)
            self._end(run)

    def _end(self, run: _Running) -> None:
        run.decode.kv.free(run.stream.sequence)
        self._tell(run.decode.session.ended, run.stream.key)
        del self._running[run.stream.key]
        self._num_left -= 1
        user, number = run.served.user, run.served.number + 1
        if number < len(self._users[user]):
            think_s = self._users[user][number].think_s
            self._after(think_s, lambda: self._send(user, number))
