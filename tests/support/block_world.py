"""One prefill and two decode workers with small pools, and a gateway that gives them choices:
their real loops, schedulers, caches and pools in one thread. The model is pretended
(``pretend_engine.py``), and so is the hand-off (``pretend_handoff.py``).

Commands wait in a worker's inbox until it takes a round. ``check`` may be asked after anything;
``settle`` lets everything end, and asserts that it does.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from support.pretend_engine import KnowingEngine, kv_of, next_token
from support.pretend_handoff import PretendHandoff, PretendPulls
from support.sequences import DOMAIN, sequence

from baton.config import EngineConfig, KvTransferConfig
from baton.errors import DrainingError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2 as pb
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.session_server import StepEvents, StreamKey
from decode_workers.lends import Lends
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from decode_workers.worker import DecodeWorker
from engine.intake import StopRule
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sequence
from kv_transfer.keys import TransferKey
from prefill_workers.pull_costs import PullCosts
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import Lender, PrefillJob, PrefillScheduler
from prefill_workers.worker import PrefillWorker

SESSION = 1
BLOCK_SIZE = 4
PREFILL_BLOCKS, DECODE_BLOCKS = 10, 8
MOST_TOKENS = 24
"""Of prompt and answer: less than the smallest pool holds."""
LIMITS = {"max_num_batched_tokens": 7, "max_num_seqs": 4}
WATERMARK_BLOCKS = 1
NEVER = 1e18
SETTLES_WITHIN = 100
"""Rounds of every worker; under 20 do where nobody waits for ever."""


class Now:
    """Stands for the event loop: what is called happens at once."""

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, function: Any, *args: Any) -> None:
        function(*args)


class RaisingInbox(Inbox):
    """Where an engine would die of an error, the test does."""

    def fail(self, error: BaseException) -> None:
        raise error


@dataclass(eq=False)
class Choice:
    """What the gateway knows of one."""

    prompt: list[int]
    max_tokens: int
    number: int
    emitted: list[int] = field(default_factory=list)
    num_attempts: int = 0
    key: StreamKey | None = None
    """Of the attempt under way."""
    decode: int = 0
    over: bool = False


class Side:
    """One worker and what is around it; its subclasses make the worker."""

    def __init__(
        self, role: str, num_blocks: int, world: BlockWorld, kv: type[KvCache], loop: Any = None
    ):
        layout = KvLayout(num_blocks, 1, 1, BLOCK_SIZE, 2, "float32")
        self.kv = kv(layout, memoryview(bytearray(layout.num_bytes)), DOMAIN)
        self.kv.pool.watch()
        self.engine = KnowingEngine(self.kv)
        self.inbox = RaisingInbox(loop or Now())
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry, worker_id="w", role=role)
        self.outbox = Outbox(self.inbox, self.metrics)
        self.outbox.deliver = lambda events: world.take(self, events)
        self.common: dict[str, Any] = {
            "engine": self.engine,
            "inbox": self.inbox,
            "outbox": self.outbox,
            "metrics": self.metrics,
            "faults": Faults(Path("/nonexistent"), "w"),
            "config": EngineConfig(),
        }
        self.worker: Any = None
        self.told: set[bytes] = set()
        """What a gateway believes the prefix cache to hold."""
        self.opened: dict[StreamKey, PrefillJob | DecodeStream] = {}
        self._contents: dict[bytes, list[int]] = {}
        """By the hash of a full block."""

    def round(self) -> None:
        self.inbox.run_pending(wait_s=0)
        self.worker.step()

    def quarantined(self) -> set[int]:
        return set()

    def forget(self) -> None:
        """Everything that is cached has to make room."""
        pool = self.kv.pool
        pool.release(pool.allocate(pool.num_available) or ())

    def lent(self) -> list[int]:
        """Blocks that are held for others to read."""
        return []

    def check(self) -> None:
        """Each block is in exactly one state, and everyone who refers to it is known."""
        pool = self.kv.pool
        pool.check()
        counts = dataclasses.astuple(pool.counts())
        assert sum(counts) == pool.num_blocks
        assert min(counts) >= 0
        sequences = [each.sequence for each in self.opened.values()]
        holders = Counter(block for seq in sequences for block in seq.block_table)
        holders.update(self.lent())
        references = {block: num for block, num in enumerate(pool._num_references) if num}
        assert references == holders, "a block is held by nobody, or not by who believes it"
        assert pool._quarantined == self.quarantined(), "nobody waits for their drain"
        for seq in sequences:
            self.engine.slots.check(seq)
            self.remember(seq)
        for block_hash, block in pool._block_of_hash.items():
            found = self.engine.slots.block(block)
            assert found == self._contents[block_hash], "a cached block is not what it is named"

    def remember(self, seq: Sequence) -> None:
        """What each of its full blocks holds, for ``check``."""
        for index, block_hash in enumerate(seq.block_hashes):
            if block_hash not in self._contents:
                tokens = range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                self._contents[block_hash] = [kv_of(seq.token_ids, token) for token in tokens]

    def assert_at_rest(self) -> None:
        self.check()
        counts = self.kv.pool.counts()
        assert (counts.referenced, counts.quarantined) == (0, 0), "blocks are held at rest"
        assert self.worker.idle
        assert self.told == self.kv.pool.published(), "gateways were told of another cache"


def no_pulls(kv: KvCache, inbox: Inbox, scheduler: PrefillScheduler) -> Pulls:
    """Of a worker whose jobs have nobody to pull from."""
    costs = PullCosts(block_size=BLOCK_SIZE, token_bytes=16, step_tokens=7)
    return Pulls(kv, None, inbox, scheduler=scheduler, costs=costs)  # type: ignore[arg-type]


class PrefillSide(Side):
    def __init__(
        self,
        world: BlockWorld,
        worker_class: type[PrefillWorker],
        kv: type[KvCache],
        pulls: type[Pulls],
        scheduler_class: type[PrefillScheduler],
    ):
        super().__init__("prefill", PREFILL_BLOCKS, world, kv)
        self.handoff = PretendHandoff(self.engine.slots, self.inbox)
        self.puller = PretendPulls(self.engine.slots, self.inbox)
        scheduler = scheduler_class(
            self.kv, **LIMITS, moving_pays=lambda num_tokens, lender: num_tokens > 0
        )
        self.pulls = pulls(
            self.kv,
            self.puller,  # type: ignore[arg-type]
            self.inbox,
            scheduler=scheduler,
            costs=PullCosts(block_size=BLOCK_SIZE, token_bytes=16, step_tokens=7),
        )
        self.worker = self.handoff.prefill = worker_class(
            **self.common,
            scheduler=scheduler,
            sender=self.handoff,  # type: ignore[arg-type]
            pulls=self.pulls,
        )
        self.puller.hears(self.worker, self.pulls)

    def quarantined(self) -> set[int]:
        return {block for blocks in self.pulls._quarantined.values() for block in blocks}


class DecodeSide(Side):
    def __init__(
        self,
        world: BlockWorld,
        prefill: PrefillSide,
        epoch: bytes,
        worker_class: type[DecodeWorker],
        kv: type[KvCache],
        lends: type[Lends],
        scheduler: type[DecodeScheduler],
    ):
        super().__init__("decode", DECODE_BLOCKS, world, kv)
        self.receiver = prefill.handoff.receiver(self.engine.slots, self.inbox)
        self.lender = prefill.puller.lender(epoch, self.engine.slots, self.inbox)
        self.worker = self.receiver.decode = worker_class(
            **self.common,
            scheduler=scheduler(self.kv, **LIMITS, watermark_blocks=WATERMARK_BLOCKS),
            receiver=self.receiver,  # type: ignore[arg-type]
            lender=self.lender,  # type: ignore[arg-type]
            transfer_config=KvTransferConfig(),
        )
        self.worker.lends = self.lender.lends = lends(
            self.kv,
            self.lender,  # type: ignore[arg-type]
            self.inbox,
            receiving=self.worker._receiving,
        )

    def lent(self) -> list[int]:
        return [block for blocks in self.worker.lends._lent.values() for block in blocks]

    def quarantined(self) -> set[int]:
        return {block for blocks in self.worker._quarantined.values() for block in blocks}

    @property
    def num_preemptions(self) -> int:
        return int(self.worker._scheduler.num_preemptions)


class BlockWorld:
    """The classes may be mutants."""

    def __init__(
        self,
        *,
        kv: type[KvCache] = KvCache,
        prefill: type[PrefillWorker] = PrefillWorker,
        decode: type[DecodeWorker] = DecodeWorker,
        pulls: type[Pulls] = Pulls,
        lends: type[Lends] = Lends,
        prefill_scheduler: type[PrefillScheduler] = PrefillScheduler,
        decode_scheduler: type[DecodeScheduler] = DecodeScheduler,
    ) -> None:
        self.prefill = PrefillSide(self, prefill, kv, pulls, prefill_scheduler)
        self.decodes = [
            DecodeSide(self, self.prefill, bytes([number]), decode, kv, lends, decode_scheduler)
            for number in range(2)
        ]
        self.handoff = self.prefill.handoff
        self.handoffs = [self.handoff, *(side.lender for side in self.decodes)]
        self.sides: list[Side] = [self.prefill, *self.decodes]
        self.choices: list[Choice] = []
        self.seen: Counter[str] = Counter()
        """Of what makes a schedule worth anything."""
        self._of_key: dict[StreamKey, Choice] = {}

    @property
    def unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if not choice.over]

    # ------------------------------------------------------------- what may happen

    def arrive(self, prompt: list[int], num_tokens: int, decode: int, *, local: bool) -> None:
        assert len(prompt) + num_tokens <= MOST_TOKENS
        choice = Choice(prompt, num_tokens, len(self.choices))
        self.choices.append(choice)
        self.attempt(choice, decode, local=local)

    def attempt(self, choice: Choice, decode: int, *, local: bool) -> None:
        """Another attempt, with what was emitted; one that is under way is cancelled."""
        self.give_up(choice)
        side, tokens = self.decodes[decode], [*choice.prompt, *choice.emitted]
        if choice.num_attempts:
            self.seen["attempts while blocks are quarantined"] += bool(side.quarantined())
        choice.key = StreamKey(SESSION, 100 * choice.number + choice.num_attempts)
        choice.decode = decode
        transfer, handoff = (None, None) if local else self.handoff_of(choice, decode)
        choice.num_attempts += 1
        self._of_key[choice.key] = choice
        stop = StopRule(choice.max_tokens, frozenset())

        def new_sequence() -> Sequence:
            return sequence(choice.key, tokens, len(choice.prompt))

        if transfer is not None:
            job = PrefillJob(choice.key, "r", new_sequence(), stop, transfer, NEVER)
            job.lender = Lender("decode", "")
            self._open(self.prefill, job)
        stream = DecodeStream(
            choice.key, "r", new_sequence(), stop, NEVER, transfer,
            handoff, NEVER, num_input_tokens=len(tokens),
        )  # fmt: skip
        self._open(side, stream)

    def handoff_of(self, choice: Choice, decode: int) -> tuple[TransferKey, pb.Handoff]:
        """That of the choice's next attempt."""
        transfer_id = bytes([choice.number])
        return TransferKey(transfer_id, choice.num_attempts, b"p", bytes([decode])), pb.Handoff()

    @staticmethod
    def _open(side: Side, work: PrefillJob | DecodeStream) -> None:
        side.opened[work.key] = work
        side.inbox.post(side.worker.open, work)

    def give_up(self, choice: Choice, *, but: Side | None = None) -> None:
        """Cancels the attempt that is under way; what comes of it no longer counts."""
        key, choice.key = choice.key, None
        if key is not None:
            for side in (self.prefill, self.decodes[choice.decode]):
                if side is not but:
                    side.inbox.post(side.worker.cancel, key)

    def cancel(self, choice: Choice) -> None:
        """The client has left."""
        self.give_up(choice)
        choice.over = True

    def lose_session(self, side: Side) -> None:
        for choice in self._served_by(side):
            self.give_up(choice, but=side)
        side.inbox.post(side.worker.session_lost, SESSION)

    def fail_all(self, side: Side) -> None:
        """As at the end of a worker's drain."""
        side.inbox.post(side.worker.fail_all, DrainingError("it has gone away"))

    def expire(self, choice: Choice) -> None:
        """The deadline of its attempt passes."""
        for side in self.sides:
            if choice.key is not None and choice.key in side.opened:
                side.opened[choice.key].deadline = 0.0

    def _served_by(self, side: Side) -> list[Choice]:
        return [c for c in self.unfinished if c.key is not None and c.key in side.opened]

    def act_at_random(self, dice: random.Random) -> None:
        """One of all this, those that go wrong seldom."""
        what, choice = dice.random(), dice.choice(self.unfinished or [None])
        if what < 0.5:
            dice.choice(self.sides).round()
        elif what < 0.75:
            if moves := self.next_moves() if what < 0.65 else self.moves():
                dice.choice(moves)()
        elif what < 0.9 and len(self.unfinished) < 6:
            prompt = [*range(4 * dice.randrange(4)), *[90 + dice.randrange(3)] * dice.randint(1, 4)]
            self.arrive(prompt, dice.randint(1, 8), dice.randrange(2), local=dice.random() < 0.3)
        elif what < 0.95 and choice is not None:
            act = dice.choice((self.cancel, self.expire, self.attempt, self.attempt))
            if act == self.attempt:
                self.attempt(choice, dice.randrange(2), local=dice.random() < 0.4)
            else:
                act(choice)
        elif what < 0.98:
            self.prefill.forget()
        else:
            dice.choice((self.lose_session, self.fail_all))(dice.choice(self.sides))

    def moves(self) -> list[Callable[[], None]]:
        """Everything that may come next of what moves between pools."""
        return [move for handoff in self.handoffs for move in handoff.moves()]

    def next_moves(self) -> list[Callable[[], None]]:
        """Where nothing goes wrong that has not gone wrong before."""
        return [move for handoff in self.handoffs for move in handoff.next_moves()]

    # ------------------------------------------------------------- as the gateway

    def take(self, side: Side, events: StepEvents) -> None:
        """What a worker says: tokens count once, in order, whichever worker they are from."""
        for key, num_held in events.reserved:
            choice = self._of_key[key]
            self.seen["prefix hits"] += num_held > 0
            if choice.key == key and key in self.prefill.opened:
                self.prefill.inbox.post(self.prefill.worker.proceed, key, num_held)
        for key, position, token_id in events.tokens:
            choice = self._of_key[key]
            if choice.key == key:
                assert position <= len(choice.emitted), "a token is missing"
                if position == len(choice.emitted):
                    choice.emitted.append(token_id)
                expected = next_token([*choice.prompt, *choice.emitted[:position]])
                assert choice.emitted[position] == token_id == expected
        for key, closed in events.closed:
            if self._of_key[key].key == key:
                self._closed(self._of_key[key], closed)
        for block_hash, is_held in events.cache.items():
            (side.told.add if is_held else side.told.discard)(block_hash)

    def _closed(self, choice: Choice, closed: pb.Closed) -> None:
        if closed.reason == pb.CLOSE_REASON_HANDED_OFF:
            self.seen["hand-offs"] += 1
        elif closed.reason == pb.CLOSE_REASON_LENGTH:
            assert len(choice.emitted) == choice.max_tokens
            self.seen["answers"] += 1
            self.cancel(choice)
        else:
            assert closed.reason == pb.CLOSE_REASON_FAILED
            self.seen[f"failed: {closed.error_code}"] += 1
            self.give_up(choice)

    # ------------------------------------------------------------- what always holds

    def check(self) -> None:
        self._forget_what_is_over()
        for side in self.sides:
            side.check()
        for handoff, source in zip(self.handoffs, self.sides, strict=True):
            for transfer in handoff.transfers.values():
                if not transfer.drained:
                    self._check_written(transfer)
                if transfer.is_leased:
                    references = source.kv.pool._num_references
                    first = transfer.start_token // BLOCK_SIZE
                    read = [references[block] for block in transfer.source_blocks[first:]]
                    assert all(read), "blocks that are read were given back"
        self.seen["pulls"] = sum(side.lender.num_complete for side in self.decodes)
        self.seen["preemptions"] = sum(side.num_preemptions for side in self.decodes)
        self.seen["late writes"] = self.handoffs[0].num_late_writes
        self.seen["late pulls"] = sum(side.lender.num_late_writes for side in self.decodes)

    def _check_written(self, transfer: Any) -> None:
        """What a hand-off may write is its own stream's, or quarantined."""
        side = next(s for s in self.sides if s.engine.slots is transfer.target)
        for block in transfer.target_blocks:
            is_own = side.kv.pool._num_references[block] == 1
            assert is_own or block in side.kv.pool._quarantined, "another may get it"
            assert side.kv.pool._hashes[block] is None, "shared before it was received"

    def _forget_what_is_over(self) -> None:
        """So that a long schedule does not get slow."""
        for side in self.sides:
            current = {choice.key for choice in self._served_by(side)}
            known = side.worker._jobs if side is self.prefill else side.worker._streams
            for key, work in list(side.opened.items()):
                posted = side.inbox._queue.qsize() > 0
                if not (key in current or key in known or posted or work.sequence.block_table):
                    side.remember(work.sequence)
                    del side.opened[key]

    def settle(self) -> None:
        """Nothing goes wrong any more: every choice gets its whole answer, and at rest no
        block is held."""
        for _ in range(SETTLES_WITHIN):
            for choice in self.unfinished:
                if choice.key is None:
                    self.attempt(choice, choice.number % 2, local=bool(choice.number % 3))
            for move in self.next_moves():
                move()
            for side in self.sides:
                side.round()
            self.check()
            quiet = not (self.unfinished or self.next_moves())
            if quiet and all(side.worker.idle for side in self.sides):
                break
        assert not self.unfinished, "somebody waits for ever"
        for side in self.sides:
            side.assert_at_rest()
