"""Worker processes of ``wired_world.py``: the real hand-off around a real worker, on an event
loop of its own. ``wired`` lets their peers find each other in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from support.block_world import (
    DECODE_BLOCKS,
    LIMITS,
    PREFILL_BLOCKS,
    WATERMARK_BLOCKS,
    Side,
    no_pulls,
)
from support.hand_loop import HandLoop
from support.memory_stream import (
    TRANSPORT,
    Copying,
    MemoryCall,
    MemoryPull,
    MemoryServe,
)

from baton.config import KvTransferConfig, SessionConfig
from decode_workers.scheduler import DecodeScheduler
from engine.kv_cache.kv_cache import KvCache
from kv_transfer import peer
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.usable_transports import UsableTransports
from prefill_workers.scheduler import PrefillScheduler

if TYPE_CHECKING:
    from support.wired_world import WiredWorld

CONFIG = KvTransferConfig(transport=TRANSPORT, lease_s=2.0, attach_s=2.0, operation_s=1.0)


class Crashes(logging.Handler):
    """What the hand-off logs as an error: nothing that comes over a stream may lead to one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@contextmanager
def wired() -> Iterator[Crashes]:
    """Within it, peers connect by memory, and logs are kept quiet."""
    channels = SimpleNamespace(channel=_channel, auth_metadata=lambda secret: ())
    logger, crashes = logging.getLogger("kv_transfer"), Crashes()
    before = (logger.level, logger.propagate)
    with patch.object(peer, "rpc", channels), patch.object(peer, "TransferStub", lambda c: c):
        logger.addHandler(crashes)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        try:
            yield crashes
        finally:
            logger.removeHandler(crashes)
            logger.setLevel(before[0])
            logger.propagate = before[1]


class _Channel:
    def __init__(self, process: Process, address: str) -> None:
        self._process, self._address = process, address

    def Pull(self, metadata: object) -> MemoryCall:
        return MemoryCall(self._process.world.connect(self._process, self._address))

    async def close(self) -> None: ...


def _channel(address: str, session: object) -> _Channel:
    return _Channel(asyncio.get_running_loop().process, address)  # type: ignore[attr-defined]


class _HeapMemory(KvMemory):
    """Of this process alone, taken and given back quickly."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = memoryview(bytearray(num_bytes))


class Process(Side):
    """One worker process: what ``Side`` is, with its hand-off and its own event loop."""

    def __init__(
        self, role: str, name: str, num_blocks: int, world: WiredWorld, kv: type[KvCache]
    ) -> None:
        self.world, self.name = world, name
        self.loop = HandLoop(world.clock, self)
        self.epoch = f"{name}/{next(world.numbers)}".encode()
        self.stopped = self.dead = False
        super().__init__(role, num_blocks, world, kv, self.loop)
        self.ended: Counter[tuple[str, TransferKey]] = Counter()
        """What the hand-off has said of each transfer's end."""
        self.handoff_args: dict[str, Any] = {
            "worker_id": name,
            "epoch": self.epoch,
            "digest": b"digest",
            "generation": "0",
            "layout": self.kv.layout,
            "memory": _HeapMemory(self.kv.layout.num_bytes),
            "secret": "secret",
            "config": CONFIG.model_copy(update={"verify": world.verify}),
            "metrics": self.metrics,
            "faults": self.common["faults"],
        }

    def round(self) -> None:
        if not self.stopped:
            self.loop.run()
            super().round()
            self.loop.run()

    @property
    def copies(self) -> list[Copying]:
        return []

    def kill(self) -> None:
        """Nothing that it does from here on has any effect outside."""
        self.dead = True
        self.loop.end()


class PrefillProcess(Process):
    def __init__(self, world: WiredWorld) -> None:
        super().__init__("prefill", "prefill-0", PREFILL_BLOCKS, world, world.classes["kv"])
        self.leased: dict[TransferKey, list[int]] = {}
        """By transfer, the blocks that were announced and are not freed."""
        with self.loop.running():
            sender = world.classes["sender"](**self.handoff_args, on_freed=self._freed)
            sender._servicer._transports = {TRANSPORT: MemoryServe()}
            sender._servicer._usable = UsableTransports([TRANSPORT])
        self.sender = sender
        sender.register(self)
        scheduler = PrefillScheduler(self.kv, **LIMITS)
        self.worker = world.classes["prefill"](
            **self.common,
            scheduler=scheduler,
            sender=self,
            pulls=no_pulls(self.kv, self.inbox, scheduler),
        )
        world.memories[self.epoch] = self.engine.slots
        self.loop.start(sender.start())
        self.loop.run()

    # As a grpc.aio.Server, for ``register``.
    def add_generic_rpc_handlers(self, handlers: object) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.pull = handlers["Pull"].stream_stream

    # As a KvSender, for the worker.
    def offer(self, key: TransferKey, *, start_token: int, num_tokens: int) -> None:
        self.leased[key] = []
        self.sender.offer(key, start_token=start_token, num_tokens=num_tokens)

    def ready(self, key: TransferKey, end_token: int, block_ids: list[int]) -> None:
        if key in self.leased:
            before = self.leased[key]
            assert list(block_ids[: len(before)]) == before, "an announced block is another"
            self.leased[key] = list(block_ids)
        self.sender.ready(key, end_token, block_ids)

    def commit(self, *args: Any) -> None:
        self.sender.commit(*args)

    def abort(self, *args: Any) -> None:
        self.sender.abort(*args)

    def _freed(self, key: TransferKey, outcome: str) -> None:
        self.leased.pop(key, None)
        if outcome == "released":
            self.world.released.add(key)
        self.ended["freed", key] += 1
        self.inbox.post(self.worker.freed, key, outcome)

    def machines(self, but: TransferKey | None) -> dict[TransferKey, str]:
        offers = self.sender._offers.items()
        return {key: repr(vars(offer.machine)) for key, offer in offers if key != but}

    def check(self) -> None:
        super().check()
        for key, offer in self.sender._offers.items():
            is_held = key in self.leased or not offer.machine._operations
            assert is_held, "freed while an operation reads the blocks"
        for blocks in self.leased.values():
            held = [self.kv.pool._num_references[block] for block in blocks]
            assert all(held) or self.inbox._queue.qsize(), "blocks that are leased were given back"
        assert all(num == 1 for num in self.ended.values()), "freed twice"

    def close(self) -> Any:
        return self.sender.close()


class DecodeProcess(Process):
    def __init__(self, world: WiredWorld, number: int) -> None:
        name = f"decode-{number}"
        super().__init__("decode", name, DECODE_BLOCKS, world, world.classes["kv"])
        with self.loop.running():
            self.receiver = world.classes["receiver"](
                **self.handoff_args,
                session=SessionConfig(),
                on_ready=self._ready,
                on_failed=self._failed,
                on_drained=self._drained,
                idle_s=1e9,
            )
            self.pull_transport = MemoryPull(self, world.memories, knows=world.knows)
            self.receiver._settings.transports[TRANSPORT] = self.pull_transport
        self.worker = world.classes["decode"](
            **self.common,
            scheduler=DecodeScheduler(self.kv, **LIMITS, watermark_blocks=WATERMARK_BLOCKS),
            receiver=self.receiver,
            lender=None,  # nobody here asks for a lend
            transfer_config=CONFIG,
        )

    def _ready(self, key: TransferKey, *args: Any) -> None:
        self.ended["ended", key] += 1
        self.world.seen["ready"] += 1
        assert not self.copies_of(key), "ready while a copy writes the blocks"
        assert key in self.world.released, "ready without the sender's acknowledgement"
        self.inbox.post(self.worker.handed_over, key, *args)

    def _failed(self, key: TransferKey, error: Any) -> None:
        self.ended["ended", key] += 1
        self.world.seen[f"hand-off failed: {error.code}"] += 1
        self.inbox.post(self.worker.handoff_failed, key, error)

    def _drained(self, key: TransferKey) -> None:
        self.ended["drained", key] += 1
        self.inbox.post(self.worker.drained, key)

    @property
    def copies(self) -> list[Copying]:
        return [copy for link in self.pull_transport.links for copy in link.copies]

    def copies_of(self, key: TransferKey) -> list[Copying]:
        known = self.receiver._transfers.get(key)
        operations = list(known.operations.values()) if known is not None else []
        return [copy for copy in self.copies if copy.operation in operations]

    def machines(self, but: TransferKey | None) -> dict[TransferKey, str]:
        transfers = self.receiver._transfers.items()
        return {key: repr(vars(each.machine)) for key, each in transfers if key != but}

    def quarantined(self) -> set[int]:
        return {block for blocks in self.worker._quarantined.values() for block in blocks}

    @property
    def num_preemptions(self) -> int:
        return int(self.worker._scheduler.num_preemptions)

    def check(self) -> None:
        super().check()
        pool = self.kv.pool
        for copy in self.copies:
            for block in copy.blocks.blocks:
                is_own = pool._num_references[block] == 1
                assert is_own or block in pool._quarantined, "a block is written and free"
                assert pool._hashes[block] is None, "shared before it was received"
        assert all(num == 1 for num in self.ended.values()), "a transfer ended twice"

    def close(self) -> Any:
        return self.receiver.close()
