"""Hand-off between hosts without special hardware: gloo over TCP, one group per pair.

Decode posts its receives, then asks for the range (Fetch); prefill sends what is
asked for, in that order. Each link has one thread on either side, which owns the
pair. A pair that failed is never used again: the link is lost, the stream is
closed, and the next stream's handshake makes a new pair.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from baton.errors import TransferError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import CheckedBlocks
from kv_transfer.memory import KvMemory
from kv_transfer.ranges import BlockRange, valid_tokens
from kv_transfer.transports.base import (
    Ended,
    LinkError,
    Operation,
    PostedOperations,
    PullLink,
    PullTransport,
    Quiescence,
    ServeLink,
    ServeTransport,
)
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    import torch

    from kv_transfer.gpu_memory import GpuMemory
    from kv_transfer.transports import gloo

logger = logging.getLogger(__name__)

NAME = "gloo"
PREFILL_RANK, DECODE_RANK = 0, 1
_NUM_TAGS = 1 << 20
"""Tags count the operations of a pair, so that one that went missing is a timeout,
not another operation's bytes."""


def installed() -> bool:
    """Whether this process could use gloo; imports nothing."""
    return importlib.util.find_spec("torch") is not None


class _Endpoint:
    """This process's gloo endpoint, made when it is first needed: torch takes a second to load."""

    def __init__(self, *, memory: KvMemory | GpuMemory, layout: KvLayout, host: str) -> None:
        self._memory = memory
        self._layout = layout
        self._host = host
        self._making = asyncio.Lock()
        self._made: gloo.Endpoint | None = None

    async def get(self) -> gloo.Endpoint:
        """Raises LinkError."""
        async with self._making:
            if self._made is None:
                loop = asyncio.get_running_loop()
                try:
                    self._made = await loop.run_in_executor(None, self._make)
                except (ImportError, OSError, RuntimeError) as error:
                    raise LinkError(f"gloo cannot be used here: {error}") from error
            return self._made

    def _make(self) -> gloo.Endpoint:
        module = importlib.import_module("kv_transfer.transports.gloo")
        made: gloo.Endpoint = module.Endpoint(self._layout, self._memory.buffer, self._host)
        return made


class _Pairs:
    """What both sides' links share: their thread, and the pair in it."""

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-gloo")
        self._lost = lost
        self._work: set[asyncio.Future[None]] = set()
        self._pair: gloo.GlooPair | None = None
        self._tag = 0
        self.closed = False

    async def build(self, make: Callable[[], gloo.GlooPair]) -> None:
        """Raises LinkError."""

        def in_thread() -> None:
            self._pair = make()

        await self._loop.run_in_executor(self._executor, in_thread)

    def next_tag(self) -> int:
        """In the thread, for each operation that both ranks do: they count alike."""
        self._tag = (self._tag + 1) % _NUM_TAGS
        return self._tag

    def run(self, work: Callable[[gloo.GlooPair], None], ended: Ended) -> None:
        """Does ``work`` with the pair in the thread, after earlier ones."""

        def in_thread() -> None:
            if self._pair is None or self.closed:
                raise TransferError("the gloo pair is closed")
            try:
                work(self._pair)
            except LinkError as error:
                self._pair = None
                self._loop.call_soon_threadsafe(self._lost, str(error))
                raise TransferError(str(error)) from error

        future = self._loop.run_in_executor(self._executor, in_thread)
        self._work.add(future)
        future.add_done_callback(lambda done: self._end(done, ended))

    def _end(self, future: asyncio.Future[None], ended: Ended) -> None:
        self._work.discard(future)
        error = future.exception()
        if error is not None and not isinstance(error, TransferError):
            error = TransferError(f"the copy failed: {error!r}")
        ended(error)

    async def close(self) -> None:
        self.closed = True
        await asyncio.gather(*self._work, return_exceptions=True)

        def in_thread() -> None:
            self._pair = None

        # The pair's destructor joins gloo's thread: not on the event loop.
        await self._loop.run_in_executor(self._executor, in_thread)
        self._executor.shutdown(wait=False)


class GlooPullLink(PullLink):
    name: ClassVar[str] = NAME

    def __init__(
        self, *, pairs: _Pairs, pool: CheckedBlocks, endpoint: gloo.Endpoint, faults: Faults
    ) -> None:
        self._pairs = pairs
        self._pool = pool
        self._tensors = endpoint.pool
        self._faults = faults
        self._loop = asyncio.get_running_loop()
        self._posted = PostedOperations()

    def post(self, blocks: BlockRange, *, posted: Callable[[], None], ended: Ended) -> Operation:
        operation = Operation(blocks, ended)

        def end(error: TransferError | None) -> None:
            self._posted.end(operation)
            ended(error)

        self._pairs.run(lambda pair: self._pull(operation, pair, posted), end)
        return operation

    def quiesce(self, operation: Operation) -> Quiescence:
        """A posted receive cannot be taken back: the peer decides when it ends."""
        return self._posted.stop(operation)

    async def close(self) -> None:
        await self._pairs.close()

    def _pull(self, operation: Operation, pair: gloo.GlooPair, posted: Callable[[], None]) -> None:
        """In the link's thread."""
        self._faults.hit("decode.copy")
        self._posted.add(operation)
        blocks = operation.blocks
        counts = valid_tokens(blocks.start_token, blocks.end_token, self._pool.layout.block_size)
        pieces = self._tensors.pieces(blocks.blocks, counts)
        pair.receive(pieces, self._pairs.next_tag(), lambda: self._tell(posted))
        self._pool.verify_all(blocks)

    def _tell(self, posted: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(posted)


class GlooPull(PullTransport):
    """Decode's side. ``host`` is this process's own address."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        pool: CheckedBlocks,
        memory: KvMemory | GpuMemory,
        host: str,
        timeout_s: float,
        faults: Faults,
    ) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._faults = faults
        self._endpoint = _Endpoint(memory=memory, layout=pool.layout, host=host)

    async def connect(
        self,
        welcome: pb.PeerWelcome,
        peer_layout: KvLayout,
        lost: Callable[[str], None],
        rendezvous: Rendezvous,
    ) -> GlooPullLink:
        endpoint = await self._endpoint.get()
        pairs = _Pairs(lost)
        timeout_s = min(self._timeout_s, welcome.gloo.timeout_ms / 1000)
        make = partial(endpoint.pair, rendezvous, rank=DECODE_RANK, timeout_s=timeout_s)
        try:
            await pairs.build(make)
        except BaseException:
            await pairs.close()
            raise
        return GlooPullLink(pairs=pairs, pool=self._pool, endpoint=endpoint, faults=self._faults)

    async def close(self) -> None:
        return


class GlooServeLink(ServeLink):
    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        pairs: _Pairs,
        make: Callable[[], gloo.GlooPair],
        endpoint: gloo.Endpoint,
        faults: Faults,
    ) -> None:
        self._pairs = pairs
        self._make = make
        self._pool = endpoint.pool
        self._faults = faults

    async def connect(self) -> None:
        await self._pairs.build(self._make)

    def send(self, blocks: BlockRange, ended: Ended) -> None:
        counts = self._counts(blocks.start_token, blocks.end_token)
        self._send(self._pool.pieces(blocks.source_blocks, counts), ended)

    def send_filler(self, start_token: int, end_token: int) -> None:
        self._send(self._pool.zeros(self._counts(start_token, end_token)), lambda error: None)

    async def close(self) -> None:
        await self._pairs.close()

    def _counts(self, start_token: int, end_token: int) -> list[int]:
        return valid_tokens(start_token, end_token, self._pool.layout.block_size)

    def _send(self, pieces: list[torch.Tensor], ended: Ended) -> None:
        def in_thread(pair: gloo.GlooPair) -> None:
            self._faults.hit("prefill.send")
            pair.send(pieces, self._pairs.next_tag())

        self._pairs.run(in_thread, ended)


class GlooServe(ServeTransport):
    """Prefill's side. ``host`` is this process's own address."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        memory: KvMemory | GpuMemory,
        layout: KvLayout,
        host: str,
        timeout_s: float,
        faults: Faults,
    ) -> None:
        self._timeout_s = timeout_s
        self._faults = faults
        self._endpoint = _Endpoint(memory=memory, layout=layout, host=host)

    async def start(self) -> None:
        await self._endpoint.get()

    async def open(
        self, welcome: pb.PeerWelcome, lost: Callable[[str], None], rendezvous: Rendezvous
    ) -> ServeLink:
        endpoint = await self._endpoint.get()
        welcome.gloo.timeout_ms = max(1, int(self._timeout_s * 1000))
        make = partial(endpoint.pair, rendezvous, rank=PREFILL_RANK, timeout_s=self._timeout_s)
        return GlooServeLink(pairs=_Pairs(lost), make=make, endpoint=endpoint, faults=self._faults)

    async def close(self) -> None:
        return
