"""The decode process: a real KvReceiver for each transport, the receiving rank of the bare gloo
group, memcpy over the same blocks, and the clock."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
from prometheus_client import CollectorRegistry

from baton.config import SessionConfig
from baton.errors import BatonError, TransferError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.protocol import new_epoch
from baton.telemetry import WorkerMetrics
from baton.worker.engine_thread import SWITCH_INTERVAL_S
from benchmarks.handoff import prefill_side
from benchmarks.handoff.bare import BareGloo, Memcpy
from benchmarks.handoff.bare_nixl import NixlAlone
from benchmarks.handoff.cases import COPY_CORE, TRANSFER, FreeList, Load
from benchmarks.handoff.prefill_side import SECRET, WORKER_ID, Serving, digest_of
from benchmarks.handoff.processes import Memory, pin
from engine.native.copies import native_copies
from engine.native.kernels import use_kernels
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import Ended, Operation, PullLink, PullTransport

_ATTACHED_AFTER_S = 0.1
"""Decode attaches while prefill computes: long before anything is announced."""
_LONGEST_S = 120.0
_MARK = 0x5A5A5A5A5A5A5A5A
_NUM_CHECKED = 16


@dataclass(frozen=True, slots=True)
class Moved:
    """One hand-off of a load, or one run of a bound."""

    num_bytes: int
    moved_s: float
    """While the transport had something to copy; of a bound the whole."""
    whole_s: float
    """From the first announcement to the last READY; waves are added up."""
    ready_ms: float
    """Median over requests, from its announcement and commit to its READY."""


class Copying:
    """How long a transport had something to copy: from posting to the end, as decode sees them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._num_posted = 0
        self._busy_since = 0.0

    def watch(self, pull: PullTransport) -> None:
        """Notes what the links of ``pull`` are given and end, from now on."""
        connect = pull.connect

        async def watched(*given: Any) -> PullLink:
            link = await connect(*given)
            self._watch(link)
            return link

        pull.connect = watched  # type: ignore[method-assign,assignment]

    def _watch(self, link: PullLink) -> None:
        post = link.post

        def watched(blocks: BlockRange, *, posted: Callable[[], None], ended: Ended) -> Operation:
            def end(error: TransferError | None) -> None:
                self._num_posted -= 1
                if self._num_posted == 0:
                    self.seconds += time.monotonic() - self._busy_since
                ended(error)

            if self._num_posted == 0:
                self._busy_since = time.monotonic()
            self._num_posted += 1
            return post(blocks, posted=posted, ended=end)

        link.post = watched  # type: ignore[method-assign]


class _OnOneCore(Faults):
    """Pins the thread that copies, at the fault point where it does. Plans no fault."""

    def hit(self, point: str) -> None:
        if point == "decode.copy":
            pin(COPY_CORE)


@dataclass(slots=True)
class _Receiving:
    """One transport's receiver, and what its callbacks said."""

    serving: Serving
    epoch: bytes = field(default_factory=new_epoch)
    copying: Copying = field(default_factory=Copying)
    ready_at: dict[TransferKey, float] = field(default_factory=dict)
    failed: list[BatonError] = field(default_factory=list)
    num_keys: int = 0
    receiver: KvReceiver | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def ready(self, key: TransferKey) -> None:
        self.ready_at[key] = time.monotonic()
        self.changed.set()

    def fail(self, error: BatonError) -> None:
        self.failed.append(error)
        self.changed.set()

    def new_keys(self, number: int) -> list[TransferKey]:
        first, self.num_keys = self.num_keys, self.num_keys + number
        return [
            TransferKey(each.to_bytes(16, "little"), 0, self.serving.epoch, self.epoch)
            for each in range(first, self.num_keys)
        ]

    async def wait_ready(self, keys: Sequence[TransferKey]) -> list[float]:
        """Raises BatonError, or TimeoutError."""
        async with asyncio.timeout(_LONGEST_S):
            while not all(key in self.ready_at for key in keys):
                if self.failed:
                    raise self.failed[0]
                self.changed.clear()
                await self.changed.wait()
        return [self.ready_at.pop(key) for key in keys]


class DecodeSide:
    """``open`` starts the prefill process; ``transports`` that cannot work here are told in
    ``absent``."""

    def __init__(self, layout: KvLayout, connection: Connection) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in workers
        use_kernels("auto")
        self._layout = layout
        self._connection = connection
        self._memory = KvMemory(layout.num_bytes)
        self._pool = _blocks(self._memory.buffer, layout)
        self._pool[:] = 0
        shown: Memory = connection.recv()
        source = shown.map(layout.num_bytes)
        self._source = _blocks(source, layout)
        self._memcpy = Memcpy(layout, self._source.ctypes.data, self._pool.ctypes.data)
        self._source_free, self._free = FreeList(layout, 2), FreeList(layout, 3)
        self._receiving: dict[str, _Receiving] = {}
        self._nixl_alone: NixlAlone | None = None
        self.absent: dict[str, str] = {}
        with tempfile.TemporaryDirectory(prefix="baton-handoff-") as folder:
            self._send("join_bare", f"{folder}/store")
            self._bare = BareGloo(layout, self._memory.buffer, store=f"{folder}/store", rank=1)
            self._answer()

    @classmethod
    @contextmanager
    def open(cls, layout: KvLayout) -> Iterator[Self]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=prefill_side.run, args=(theirs, layout), daemon=True)
        process.start()
        theirs.close()
        try:
            yield cls(layout, ours)
        finally:
            ours.close()
            process.join(30.0)
            process.kill()

    async def add(self, transport: str) -> None:
        serving: Serving = self._ask("serve", transport)
        if serving.absent:
            self.absent[transport] = serving.absent
            return
        own = self._receiving[transport] = _Receiving(serving)
        own.receiver = KvReceiver(
            worker_id="decode-0",
            epoch=own.epoch,
            digest=digest_of(self._layout),
            generation="0",
            layout=self._layout,
            memory=self._memory,
            secret=SECRET,
            config=TRANSFER.model_copy(update={"transport": transport}),
            session=SessionConfig(),
            metrics=WorkerMetrics(CollectorRegistry(), worker_id="decode-0", role="decode"),
            faults=_OnOneCore(None, "decode-0"),
            on_ready=lambda key, *_: own.ready(key),
            on_failed=lambda key, error: own.fail(error),
            on_drained=lambda key: None,
            copy_blocks=native_copies(),
        )
        await own.receiver.start()
        own.copying.watch(own.receiver._settings.transports[transport])

    async def close(self) -> None:
        if self._nixl_alone is not None:
            self._nixl_alone.close()
        for own in self._receiving.values():
            assert own.receiver is not None
            await own.receiver.close()

    @property
    def transports(self) -> list[str]:
        return list(self._receiving)

    # ------------------------------------------------------------------ what is measured

    async def hand_off(self, transport: str, load: Load) -> Moved:
        """Raises BatonError, TimeoutError, or ValueError for bytes that are not the source's."""
        own = self._receiving[transport]
        moved_s = whole_s = 0.0
        ready_ms: list[float] = []
        for requests in load.waves():
            blocks = self._free.take(load, requests)
            source_blocks = self._source_free.take(load, requests)
            keys = own.new_keys(requests)
            self._mark(blocks)
            await self._begin(transport, keys, load, blocks)
            own.copying.seconds = 0.0
            self._send("commit", transport, keys, load.tokens, source_blocks)
            ready_at = await own.wait_ready(keys)
            committed_at: list[float] = self._answer()
            moved_s += own.copying.seconds
            whole_s += max(ready_at) - min(committed_at)
            waited = zip(ready_at, committed_at, strict=True)
            ready_ms += [(ready - committed) * 1000 for ready, committed in waited]
            self._check(source_blocks, blocks)
        return Moved(self._num_bytes(load), moved_s, whole_s, statistics.median(ready_ms))

    def memcpy(self, load: Load) -> Moved:
        def run(source_blocks: list[int], blocks: list[int]) -> float:
            began_at = time.monotonic()
            self._memcpy.run(source_blocks, blocks)
            return time.monotonic() - began_at

        with _on_copy_core():
            return self._bound(load, run)

    def nixl(self, load: Load) -> Moved:
        """Where NIXL is among the transports. Raises TransferError."""
        return self._bound(load, self.nixl_alone().read)

    def nixl_alone(self) -> NixlAlone:
        """Made when it is first wanted."""
        if self._nixl_alone is None:
            self._nixl_alone = NixlAlone(self._layout, self._ask("serve_bare_nixl"))
        return self._nixl_alone

    def gloo(self, load: Load, *, contiguous: bool) -> Moved:
        def run(source_blocks: list[int], blocks: list[int]) -> float:
            self._send("send_bare", source_blocks, contiguous=contiguous)
            if contiguous:
                self._bare.receive_contiguous(len(blocks))
            else:
                self._bare.receive_scattered(blocks)
            ended_at = time.monotonic()
            began_at: float = self._answer()
            return ended_at - began_at

        with _on_copy_core():
            return self._bound(load, run)

    # ------------------------------------------------------------------------- helpers

    def _bound(self, load: Load, run: Callable[[list[int], list[int]], float]) -> Moved:
        """``run`` moves blocks and returns the seconds that it took."""
        total_s = 0.0
        for requests in load.waves():
            source_blocks = list(chain(*self._source_free.take(load, requests)))
            total_s += run(source_blocks, list(chain(*self._free.take(load, requests))))
        return Moved(self._num_bytes(load), total_s, total_s, total_s * 1000)

    async def _begin(
        self, transport: str, keys: list[TransferKey], load: Load, blocks: list[list[int]]
    ) -> None:
        own = self._receiving[transport]
        assert own.receiver is not None
        self._ask("offer", transport, keys, load.tokens)
        for key, ids in zip(keys, blocks, strict=True):
            own.receiver.begin(
                key,
                address=own.serving.address,
                source_worker_id=WORKER_ID,
                start_token=0,
                num_tokens=load.tokens,
                block_ids=ids,
            )
        await asyncio.sleep(_ATTACHED_AFTER_S)

    def _num_bytes(self, load: Load) -> int:
        return load.requests * load.tokens * self._layout.token_bytes

    def _mark(self, blocks: list[list[int]]) -> None:
        for block in (block for ids in blocks for block in ids):
            self._pool[block, 0] = self._pool[block, -1] = _MARK

    def _check(self, source_blocks: list[list[int]], blocks: list[list[int]]) -> None:
        """Of every block its ends, and some blocks whole."""
        for of_request, ids in zip(source_blocks, blocks, strict=True):
            for ends in (0, -1):
                _expect(self._source[of_request, ends], self._pool[ids, ends])
            every = max(1, len(ids) // _NUM_CHECKED)
            for source_block, block in list(zip(of_request, ids, strict=True))[::every]:
                _expect(self._source[source_block], self._pool[block])

    def _ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        self._send(name, *arguments, **named)
        return self._answer()

    def _send(self, name: str, *arguments: Any, **named: Any) -> None:
        self._connection.send((name, arguments, named))

    def _answer(self) -> Any:
        """Raises TransferError where the prefill process is gone."""
        try:
            return self._connection.recv()
        except EOFError:
            raise TransferError("the prefill process ended") from None


@contextmanager
def _on_copy_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    pin(COPY_CORE)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _expect(source: Any, arrived: Any) -> None:
    if not np.array_equal(source, arrived):
        raise ValueError("what arrived is not what was sent")


def _blocks(memory: Any, layout: KvLayout) -> Any:
    """``[block][word of 8 bytes]``."""
    words = np.frombuffer(memory, dtype=np.uint64, count=layout.num_bytes // 8)
    return words.reshape(layout.num_blocks + 1, -1)
