"""The ranks of one prefill worker in one process, of which a test moves now this one, now that.

Each rank is a thread, and one of them runs at a time: it gives way before and after it writes
a layer's KV, and where it waits for others in a collective. The worker, its engine, the
messages of a step, what a follower computes and the groups are the real ones; in memory are
the sockets and torch's process groups. A collective gives a rank its result once every rank
has brought its part: that, and no more, is what torch's do.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from support.block_world import Now, RaisingInbox, no_pulls
from support.sequences import sequence
from support.tiny_engine import DOMAIN, TINY, kv_layout, model_config, tokens
from support.tiny_models import tiny_tensors

from baton.checkpoint.checkpoint import Checkpoint
from baton.config import EngineConfig
from baton.faults import Faults
from baton.parallelism import Parallelism
from baton.telemetry import WorkerMetrics
from baton.worker.outbox import Outbox
from baton.worker.session_server import StreamKey
from engine.attention.paged_cpu import attention_of
from engine.engine import Engine
from engine.intake import StopRule
from engine.models.decoder import Decoder
from engine.parallel.follower import _Rank
from engine.parallel.followers import READY, Followers
from engine.parallel.group import ParallelGroup, RankGroups
from engine.parallel.shard import Shard
from engine.parallel.step_message import decode_step
from kv_transfer.keys import TransferKey
from prefill_workers.scheduler import PrefillJob, PrefillScheduler
from prefill_workers.worker import PrefillWorker

NUM_BLOCKS, BLOCK_SIZE, CHUNK = 8, 4, 7
NUM_TOKENS = 18
CONFIG = model_config(TINY)
LAYOUT = kv_layout(CONFIG, NUM_BLOCKS, BLOCK_SIZE)
KEY = StreamKey(1, 1)
TRANSFER = TransferKey(b"t", 0, b"p", b"d")


class Gone(BaseException):
    """Ends a rank's thread where it stands."""


class Rank:
    """One thread. ``may_run`` is when it has something to do."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.may_run: Callable[[], bool] = lambda: True
        self.stopped = self.done = False
        self.error: BaseException | None = None
        self._is_gone = False
        self._turn, self._given_back = threading.Semaphore(0), threading.Semaphore(0)
        self._work = work
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        try:
            self._wait_turn()
            self._work()
        except Gone:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self._given_back.release()

    def _wait_turn(self) -> None:
        self._turn.acquire()
        if self._is_gone:
            raise Gone

    def give_way(self, until: Callable[[], bool] = lambda: True) -> None:
        """In the rank's thread: lets others run, at least as long as ``until`` is not true."""
        self.may_run = until
        self._given_back.release()
        self._wait_turn()

    def move(self) -> None:
        """Runs it to where it gives way."""
        self._turn.release()
        self._given_back.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        if not self.done:
            self._is_gone = True
            self._turn.release()
            self._given_back.acquire()
        self._thread.join()


class Collectives:
    """Of one group; stands for torch.distributed's process groups of all its ranks."""

    def __init__(self, world: RankWorld, size: int) -> None:
        self._world, self._size = world, size
        self._num_calls: Counter[int] = Counter()
        self._brought: dict[int, dict[int, torch.Tensor]] = {}

    def of(self, rank: int) -> _OfRank:
        return _OfRank(self, rank)

    def bring(self, rank: int, tensor: torch.Tensor) -> int:
        number = self._num_calls[rank]
        self._num_calls[rank] += 1
        self._brought.setdefault(number, {})[rank] = tensor.clone()
        return number

    def wait(self, rank: int, number: int) -> list[torch.Tensor]:
        brought = self._brought[number]
        self._world.ranks[rank].give_way(lambda: len(brought) == self._size)
        return [brought[each] for each in range(self._size)]


class _OfRank:
    """As much of a torch.distributed.ProcessGroup as is used."""

    def __init__(self, all_ranks: Collectives, rank: int) -> None:
        self._all, self._rank = all_ranks, rank

    def allreduce(self, tensors: list[torch.Tensor]) -> _Work:
        number = self._all.bring(self._rank, tensors[0])
        return _Work(lambda: tensors[0].copy_(sum(self._all.wait(self._rank, number))))

    def gather(self, outputs: Any, tensors: list[torch.Tensor], options: Any) -> _Work:
        number = self._all.bring(self._rank, tensors[0])

        def take() -> None:
            for out, part in zip(outputs[0], self._all.wait(self._rank, number), strict=True):
                out.copy_(part)

        return _Work(take if outputs else lambda: None)


class _Work:
    def __init__(self, finish: Callable[[], Any]) -> None:
        self.wait = finish


class _Mailbox:
    """Stands for a follower's socket: the leader's end sends, the follower's receives."""

    def __init__(self, world: RankWorld, rank: int) -> None:
        self._world, self._rank = world, rank
        self._messages: deque[bytes] = deque()

    def send_bytes(self, message: bytes) -> None:
        self._messages.append(message)

    def recv_bytes(self) -> bytes:
        return READY

    def next(self) -> bytes:
        self._world.ranks[self._rank].give_way(lambda: bool(self._messages))
        return self._messages.popleft()


class SteppedAttention:
    """Gives way around each layer's writes. ``defers``: a mutant whose writes of the last layer
    are there only after the step, as those of a stream that nobody waits for."""

    def __init__(self, world: RankWorld, rank: int, attention: Any, *, defers: bool) -> None:
        self._world, self._rank, self._attention = world, rank, attention
        self._defers = defers
        self.deferred: list[Callable[[], Any]] = []

    def begin(self, batch: Any) -> Callable[..., Any]:
        step = self._attention.begin(batch)
        kv, heads = self._world.kv, Shard(self._world.parallel, self._rank).kv_heads(CONFIG)

        def attend(layer: int, query: Any, key_value: Any) -> Any:
            rank = self._world.ranks[self._rank]
            rank.give_way()
            before = kv[:, heads].clone()
            out = step(layer, query, key_value)
            if self._defers and layer == LAYOUT.num_layers - 1:
                written = kv[:, heads].clone()
                kv[:, heads] = before
                self.deferred.append(lambda: kv[:, heads].copy_(written))
            rank.give_way()
            return out

        return attend

    def write_deferred(self) -> None:
        if self.deferred:
            self._world.ranks[self._rank].give_way()
        while self.deferred:
            self.deferred.pop()()


class RankWorld:
    """``size`` ranks of one worker that prefills one prompt. The classes may be mutants."""

    def __init__(
        self,
        size: int,
        *,
        group: type[ParallelGroup] = ParallelGroup,
        worker: type[PrefillWorker] = PrefillWorker,
        defers: bool = False,
    ) -> None:
        self.parallel = Parallelism(size)
        self.memory = torch.zeros(LAYOUT.num_bytes, dtype=torch.uint8)
        self.kv = self.memory.view(torch.float32).view(LAYOUT.shape)
        self.announced: list[tuple[int, list[int]]] = []
        self.committed = False
        self.on_ready: Callable[[int, list[int]], None] = lambda end, blocks: None
        self._collectives = Collectives(self, size)
        self._boxes = [_Mailbox(self, rank) for rank in range(size)]
        self._group, self._defers = group, defers
        engine = self._engine(size)
        engine._attention = SteppedAttention(self, 0, engine._attention, defers=defers)  # type: ignore[assignment]
        self._worker = self._worker_around(engine, worker)
        followers = [self._follower(rank) for rank in range(1, size)]
        self.ranks = [Rank(self._lead), *(Rank(each) for each in followers)]

    def _groups(self, rank: int) -> RankGroups:
        size = self.parallel.num_ranks
        if size == 1:
            return RankGroups()
        world = self._group(rank, size, self._collectives.of(rank))
        return RankGroups(Shard(self.parallel, rank), world=world)

    def _engine(self, size: int) -> Engine:
        checkpoint = Checkpoint(
            name="tiny", folder=Path(), weights_source=Path(), config=CONFIG, revision="tiny",
            eos_token_ids=(), bos_token=None, eos_token=None, chat_template=None,
        )  # fmt: skip
        boxes: Any = self._boxes[1:]
        return Engine(
            checkpoint,
            dtype=torch.float32,
            layout=LAYOUT,
            memory=self.memory,
            domain=DOMAIN,
            weights=tiny_tensors(TINY),
            followers=Followers(boxes, self._groups(0)) if size > 1 else None,
        )

    def _worker_around(self, engine: Engine, worker_class: type[PrefillWorker]) -> PrefillWorker:
        inbox = RaisingInbox(Now())  # type: ignore[arg-type]
        metrics = WorkerMetrics(CollectorRegistry(), worker_id="w", role="prefill")
        outbox = Outbox(inbox, metrics)
        outbox.deliver = lambda events: None
        limits = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4}
        scheduler = PrefillScheduler(engine.kv, **limits)
        worker = worker_class(
            engine=engine,
            scheduler=scheduler,
            sender=self,  # type: ignore[arg-type]
            pulls=no_pulls(engine.kv, inbox, scheduler),
            inbox=inbox,
            outbox=outbox,
            metrics=metrics,
            faults=Faults(None, "w"),
            config=EngineConfig(),
        )
        seq = sequence(KEY, tokens(NUM_TOKENS))
        worker.open(PrefillJob(KEY, "r", seq, StopRule(9, frozenset()), TRANSFER, 1e18))
        worker.proceed(KEY, 0)
        return worker

    # As a KvSender.
    def offer(self, *args: Any, **kwargs: Any) -> None: ...

    def ready(self, key: TransferKey, end_token: int, block_ids: list[int]) -> None:
        self.announced.append((end_token, list(block_ids)))
        self.on_ready(end_token, list(block_ids))

    def commit(self, *args: Any) -> None:
        self.committed = True

    def _lead(self) -> None:
        while not self.committed:
            self._worker.step()

    @torch.inference_mode()
    def _follower(self, number: int) -> Callable[[], None]:
        groups = self._groups(number)
        rank: Any = object.__new__(_Rank)  # what its __init__ loads and joins is given here
        rank._model = Decoder(CONFIG, tiny_tensors(TINY), groups)
        attention = attention_of(CONFIG, LAYOUT, self.kv, groups)
        rank._attention = SteppedAttention(self, number, attention, defers=self._defers)

        def follow() -> None:
            while True:
                rank.compute(decode_step(self._boxes[number].next()))
                rank._attention.write_deferred()

        return follow

    # ------------------------------------------------------------- what may happen

    def runnable(self) -> list[Rank]:
        return [r for r in self.ranks if not (r.stopped or r.done) and r.may_run()]

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


def single_kv() -> torch.Tensor:
    """What one process computes for the prompt: [kv_head][layer][part][token][dim]."""
    world = RankWorld(1)
    found: list[torch.Tensor] = []
    world.on_ready = lambda end, blocks: found.append(kv_of(world.kv, end, blocks))
    while world.runnable():
        world.runnable()[0].move()
    world.end()
    return found[-1]


def kv_of(kv: torch.Tensor, end_token: int, block_ids: list[int]) -> torch.Tensor:
    """Of tokens ``[0, end_token)``."""
    blocks = kv[block_ids].permute(1, 2, 3, 0, 4, 5)  # [head, layer, part, block, token, dim]
    return blocks.flatten(3, 4)[:, :, :, :end_token].clone()
