"""A prefill and a decode worker in one event loop: their real services, loops, schedulers and
engines, with the real hand-off (gRPC, shared memory, checksums) between them. What a gateway
would do is done here; there is no Session, no registry and no process of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.handoff import until
from support.worker_rig import Rig

from baton import rpc
from baton.config import BatonConfig, EngineConfig, KvTransferConfig, SessionConfig
from baton.faults import Faults
from baton.parallelism import Parallelism
from baton.protocol import new_epoch
from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeScheduler
from decode_workers.service import DecodeService
from decode_workers.worker import DecodeWorker
from engine.engine import Engine, Sampled, Scheduled
from engine.native.copies import native_copies
from engine.parallel.followers import Followers
from engine.setup import EnginePlan, plan_engine
from kv_transfer.ends import HandoffEnds
from kv_transfer.memory import KvMemory
from prefill_workers.pull_costs import PullCosts
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import PrefillScheduler
from prefill_workers.service import PrefillService
from prefill_workers.worker import PrefillWorker

SECRET = "a-secret-of-the-tests"
SESSION = 1
ONE_PROCESS = Parallelism()
TRANSFER = KvTransferConfig(verify=True)


def greedy() -> pb.Sampling:
    return pb.Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, planned and made as a worker's ``main.py`` does it."""

    plan: EnginePlan
    memory: KvMemory
    engine: Engine

    def assert_at_rest(self) -> None:
        self.engine.kv.pool.check()
        counts = self.engine.kv.pool.counts()
        assert (counts.referenced, counts.quarantined) == (0, 0)


@contextlib.contextmanager
def built(
    model: Path,
    parallel: Parallelism = ONE_PROCESS,
    connections: Items[Connection] = (),
    *,
    kv_cache_bytes: int = 1 << 20,
) -> Iterator[Built]:
    """At fp32, in blocks of 16 tokens. ``connections`` lead to processes that serve as
    ranks."""
    settings = EngineConfig(dtype="float32", kv_cache_bytes=kv_cache_bytes, threads=1)
    config = BatonConfig(model=str(model), engine=settings)
    plan = plan_engine(config, secret=SECRET, parallel=parallel)
    memory = KvMemory(plan.layout.num_bytes, sealed=False)
    followers = None
    if parallel.num_ranks > 1:
        others = connections[: parallel.num_ranks - 1]
        followers = Followers.lead(others, plan.rank_task(config, "torch"), memory.fd)
    try:
        engine = Engine(
            plan.checkpoint,
            dtype=plan.dtype,
            layout=plan.layout,
            memory=memory.buffer,
            domain=plan.domain,
            threads=plan.threads,
            followers=followers,
        )
        memory.seal()
        yield Built(plan, memory, engine)
    finally:
        if followers is not None:
            followers.close()
        memory.close()


class CountingEngine:
    """An engine as its worker sees it, which counts what it computes."""

    def __init__(self, engine: Engine) -> None:
        self.kv = engine.kv
        self._engine = engine
        self.num_tokens = 0
        self.num_steps = 0

    def step(self, chunks: Items[Scheduled]) -> list[Sampled]:
        self.num_tokens += sum(chunk.num_tokens for chunk in chunks)
        self.num_steps += 1
        return self._engine.step(chunks)


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: Items[int]
    num_tokens: int
    """With those of ``emitted``."""
    emitted: Items[int] = ()
    """What an earlier attempt has given; it is in no answer."""
    sampling: pb.Sampling = field(default_factory=greedy)


@dataclass
class Answer:
    """What became of one request."""

    token_ids: list[int] = field(default_factory=list)
    prefill: pb.Closed | None = None
    decode: pb.Closed | None = None


class AlwaysMove(PullCosts):
    """Moves what fills a block, and waits for it as long as it is told to."""

    longest_s = 30.0

    def moving_pays(self, num_tokens: int, lender: bytes) -> bool:
        return num_tokens > 0

    def patience_s(self, num_tokens: int) -> float:
        return self.longest_s


class WorkerPair:
    """``start`` and ``close`` it on the event loop. Whoever made the engines closes them."""

    def __init__(
        self,
        prefill: Built,
        decode: Built,
        *,
        chunk: int = 512,
        pulls: bool = False,
        transfer: KvTransferConfig = TRANSFER,
        faults: Faults | None = None,
    ) -> None:
        """``chunk``: tokens computed in one step of either worker. ``pulls``: prefill fetches
        what decode holds and it does not, whatever that costs."""
        self._transfer = transfer
        self._pulls = pulls
        self.prefill_rig, self.decode_rig = Rig("prefill"), Rig("decode")
        self.prefill_engine = CountingEngine(prefill.engine)
        self.decode_engine = CountingEngine(decode.engine)
        self._epochs = new_epoch(), new_epoch()
        given, back = self.prefill_rig.inbox, self.decode_rig.inbox
        ends = self._ends(prefill, "prefill-0", self._epochs[0], self.prefill_rig, faults)
        self._sender = ends.sender(on_freed=lambda *of: given.post(self.prefill.freed, *of))
        self._puller = ends.puller(
            on_ready=lambda key, *_: given.post(self.prefill.pulled, key, time.monotonic()),
            on_failed=lambda key, _: given.post(pulling.failed, key, time.monotonic()),
            on_drained=lambda key: given.post(pulling.drained, key),
        )
        ends = self._ends(decode, "decode-0", self._epochs[1], self.decode_rig, faults)
        self._receiver = ends.receiver(
            on_ready=lambda *of: back.post(self.decode.handed_over, *of),
            on_failed=lambda *of: back.post(self.decode.handoff_failed, *of),
            on_drained=lambda *of: back.post(self.decode.drained, *of),
        )
        self._lender = ends.lender(
            on_freed=lambda key, _: back.post(self.decode.lends.over, key),
            on_wanted=lambda *of: back.post(self.decode.lends.asked, *of),
        )
        self._servers = [rpc.server(SECRET, SessionConfig()) for _ in range(2)]
        self._addresses = []
        for sender, server in zip((self._sender, self._lender), self._servers, strict=True):
            sender.register(server)
            self._addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        limits = {"max_num_batched_tokens": chunk, "max_num_seqs": 64}
        layout = prefill.plan.layout
        self.costs = costs = AlwaysMove(
            block_size=layout.block_size, token_bytes=layout.token_bytes, step_tokens=chunk
        )
        scheduler = PrefillScheduler(prefill.engine.kv, **limits, moving_pays=costs.moving_pays)
        pulling = Pulls(prefill.engine.kv, self._puller, given, scheduler=scheduler, costs=costs)
        self.prefill = PrefillWorker(
            **self._worker(self.prefill_engine, self.prefill_rig),
            scheduler=scheduler,
            sender=self._sender,
            pulls=pulling,
        )
        self.decode = DecodeWorker(
            **self._worker(self.decode_engine, self.decode_rig),
            scheduler=DecodeScheduler(decode.engine.kv, **limits, watermark_blocks=1),
            receiver=self._receiver,
            lender=self._lender,
            transfer_config=transfer,
        )
        self._prefill_service = PrefillService(
            self.prefill, _parts(prefill, self.prefill_rig, self._epochs[0])
        )
        self._decode_service = DecodeService(
            self.decode, _parts(decode, self.decode_rig, self._epochs[1])
        )
        self._num_streams = 0

    def _ends(
        self, built: Built, worker_id: str, epoch: bytes, rig: Rig, faults: Faults | None
    ) -> HandoffEnds:
        return HandoffEnds(
            worker_id=worker_id,
            epoch=epoch,
            digest=built.plan.digest,
            generation="0",
            layout=built.plan.layout,
            memory=built.memory,
            secret=SECRET,
            config=self._transfer,
            session=SessionConfig(),
            metrics=rig.metrics,
            faults=faults or rig.faults,
            on_fatal=rig.inbox.fail,
            copy_blocks=native_copies(),
        )

    @staticmethod
    def _worker(engine: CountingEngine, rig: Rig) -> dict[str, Any]:
        """What both workers are made with."""
        return {
            "engine": engine,
            "inbox": rig.inbox,
            "outbox": rig.outbox,
            "metrics": rig.metrics,
            "faults": rig.faults,
            "config": EngineConfig(),
        }

    async def start(self) -> None:
        for end in (self._sender, self._lender, self._receiver, self._puller):
            await end.start()
        for server in self._servers:
            await server.start()
        if self._pulls:
            self._puller.connect(self._addresses[1], "decode-0", self._epochs[1])
            await until(lambda: all(peer.link for peer in self._puller._peers.values()))

    async def close(self) -> None:
        """Nobody reads or writes either pool any more when this returns."""
        for end in (self._receiver, self._puller, self._sender, self._lender):
            await end.close()
        for server in self._servers:
            await server.stop(None)
        self._step()

    # ------------------------------------------------------------------ as a gateway

    async def answers(self, asks: Items[Ask], *, handed_over: bool = False) -> list[Answer]:
        """Asks everything at once and waits for all of it; the workers take steps in turn.
        Without ``handed_over`` the decode worker prefills by itself."""
        keys = [self._open(ask, handed_over) for ask in asks]
        ended = [self.decode_rig.closed, self.prefill_rig.closed][: 1 + handed_over]
        waiting = set(keys) if handed_over else set()

        def over() -> bool:
            self._step()
            for key, num_held in self.decode_rig.reserved:
                if key in waiting:
                    waiting.remove(key)
                    self._prefill_service.on_proceed(key, num_held)
            return all(closed.keys() >= set(keys) for closed in ended)

        await until(over)
        return [self._answer(*each) for each in zip(keys, asks, strict=True)]

    def _open(self, ask: Ask, handed_over: bool) -> StreamKey:
        self._num_streams += 1
        key = StreamKey(SESSION, self._num_streams)
        message = pb.Open(
            stream_id=key.stream_id,
            request_id=f"request-{key.stream_id}",
            prompt_token_ids=ask.prompt,
            emitted_token_ids=ask.emitted,
            sampling=ask.sampling,
            max_tokens=ask.num_tokens,
            remaining_ms=60_000,
        )
        if handed_over:
            message.handoff.CopyFrom(
                pb.Handoff(
                    transfer_id=key.stream_id.to_bytes(16, "little"),
                    prefill_epoch=self._epochs[0],
                    decode_epoch=self._epochs[1],
                    prefill_worker_id="prefill-0",
                    decode_worker_id="decode-0",
                    prefill_transfer_address=self._addresses[0],
                    decode_transfer_address=self._addresses[1] if self._pulls else "",
                )
            )
            self._prefill_service.on_open(key, message)
        self._decode_service.on_open(key, message)
        return key

    def _step(self) -> None:
        for rig, step in (
            (self.prefill_rig, self.prefill.step),
            (self.decode_rig, self.decode.step),
        ):
            rig.inbox.run_pending(wait_s=0)
            step()

    def _answer(self, key: StreamKey, ask: Ask) -> Answer:
        """Its tokens in order; of one that is handed over, both workers tell the first."""
        prefill, decode = self.prefill_rig, self.decode_rig
        tokens = sorted(
            (position, token_id)
            for rig in (prefill, decode)
            for of, position, token_id in rig.tokens
            if of == key
        )
        by_position = dict(tokens)
        assert all(by_position[position] == token_id for position, token_id in tokens)
        assert list(by_position) == [*range(len(ask.emitted), ask.num_tokens)]
        token_ids = list(by_position.values())
        return Answer(token_ids, prefill.closed.get(key), decode.closed.get(key))


def _parts(built: Built, rig: Rig, epoch: bytes) -> Any:
    """As much of WorkerParts as a service takes."""
    return SimpleNamespace(
        plan=built.plan,
        identity=SimpleNamespace(epoch=epoch),
        inbox=rig.inbox,
        outbox=rig.outbox,
    )


@contextlib.asynccontextmanager
async def worker_pair(prefill: Built, decode: Built, **options: Any) -> AsyncIterator[WorkerPair]:
    """A started pair; at its end both pools are at rest."""
    pair = WorkerPair(prefill, decode, **options)
    await pair.start()
    try:
        yield pair
    finally:
        await pair.close()
    prefill.assert_at_rest()
    decode.assert_at_rest()
