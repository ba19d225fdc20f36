"""Hand-off on one host: decode maps the prefill worker's pool and copies, once.

The mapping is read-only and a writer cannot reach decode's pool, so a prefill
worker that is stopped and wakes can do no harm. All copies of one decode worker
run in one thread, in the order in which they were posted, with the GIL released.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

from baton.errors import TransferError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import PoolView
from kv_transfer.memory import KvMemory, map_read_only
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import (
    Ended,
    LinkError,
    Operation,
    PullLink,
    PullTransport,
    Quiescence,
    ServeLink,
    ServeTransport,
    check_offered,
)
from kv_transfer.transports.memory_socket import MemorySocket, fetch_memory, wait_readable
from kv_transfer.transports.one_sided import OneSidedServeLink
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

NAME = "shared_memory"
AT_ONCE_BYTES = 8 << 20
"""Copied in one go, in a millisecond or two; between two the GIL is taken, and between blocks where
there is no kernel that copies."""


class SharedMemoryPullLink(PullLink):
    """One peer's mapped pool."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        pool: PoolView,
        source: PoolView,
        connection: socket.socket,
        executor: ThreadPoolExecutor,
        faults: Faults,
        lost: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._source: PoolView | None = source
        self._connection = connection
        self._executor = executor
        self._faults = faults
        self._lost = lost
        self._copies: set[asyncio.Future[None]] = set()
        self._watch = asyncio.ensure_future(self._watch_owner())

    def post(self, blocks: BlockRange, *, posted: Callable[[], None], ended: Ended) -> Operation:
        operation = Operation(blocks, ended)
        loop = asyncio.get_running_loop()
        copy = loop.run_in_executor(self._executor, self._copy, operation)
        self._copies.add(copy)
        copy.add_done_callback(lambda done: self._end(operation, done))
        return operation

    def quiesce(self, operation: Operation) -> Quiescence:
        """The copying thread looks at ``stopped`` every few milliseconds."""
        operation.stopped = True
        return Quiescence.ENDED if operation.finished else Quiescence.ENDING

    async def close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, *self._copies, return_exceptions=True)
        # The peer's memory goes now, though errors and their frames may name this link for long.
        self._source = None
        self._connection.close()

    def _end(self, operation: Operation, copy: asyncio.Future[None]) -> None:
        self._copies.discard(copy)
        operation.finished = True
        error = copy.exception()
        if error is not None and not isinstance(error, TransferError):
            error = TransferError(f"the copy failed: {error!r}")
        operation.ended(error)

    def _copy(self, operation: Operation) -> None:
        """In the copying thread. No frame but this link may name the source: one that an error
        keeps would keep the peer's memory."""
        self._faults.hit("decode.copy")
        if self._source is None:
            raise TransferError("the link is closed")
        layout = self._pool.layout
        num_at_once = max(1, AT_ONCE_BYTES // layout.block_bytes)
        for part in operation.blocks.parts(num_at_once, layout.block_size):
            if operation.stopped:
                raise TransferError("the copy was stopped")
            self._pool.copy_range(self._source, part)
            self._pool.verify_all(part)

    async def _watch_owner(self) -> None:
        await wait_readable(self._connection)
        self._lost("the owner of the shared memory is gone")


class SharedMemoryPull(PullTransport):
    name: ClassVar[str] = NAME

    def __init__(self, *, pool: PoolView, secret: str, timeout_s: float, faults: Faults) -> None:
        self._pool = pool
        self._secret = secret
        self._timeout_s = timeout_s
        self._faults = faults
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self._mapper = ThreadPoolExecutor(1, thread_name_prefix="kv-map")

    async def connect(
        self,
        welcome: pb.PeerWelcome,
        peer_layout: KvLayout,
        lost: Callable[[str], None],
        rendezvous: Rendezvous,
    ) -> SharedMemoryPullLink:
        offered = welcome.shared_memory
        check_offered(offered.num_bytes, peer_layout)
        descriptor, connection = await fetch_memory(
            offered.socket_path, secret=self._secret, timeout_s=self._timeout_s
        )
        mapping: Future[mmap.mmap] | None = None
        try:
            mapping = self._mapper.submit(_map_and_close, descriptor, offered.num_bytes)
            memory = await asyncio.wrap_future(mapping)
        except (OSError, ValueError) as error:
            connection.close()
            raise LinkError(f"the peer's memory cannot be mapped: {error}") from error
        except BaseException:
            if mapping is None or mapping.cancel():  # it has not begun, and never will
                os.close(descriptor)
            connection.close()
            raise
        return SharedMemoryPullLink(
            pool=self._pool,
            source=PoolView(peer_layout, memory),
            connection=connection,
            executor=self._executor,
            faults=self._faults,
            lost=lost,
        )

    async def close(self) -> None:
        self._executor.shutdown(wait=False)
        self._mapper.shutdown(wait=False)


def _map_and_close(descriptor: int, num_bytes: int) -> mmap.mmap:
    """In a thread, which outlives a handshake that is given up: it closes what it uses."""
    try:
        return map_read_only(descriptor, num_bytes)
    finally:
        os.close(descriptor)


class SharedMemoryServe(ServeTransport):
    name: ClassVar[str] = NAME

    def __init__(self, *, memory: KvMemory, layout: KvLayout, secret: str, timeout_s: float):
        self._num_bytes = layout.num_bytes
        self._socket = MemorySocket(memory, secret=secret, timeout_s=timeout_s)

    async def start(self) -> None:
        """Raises LinkError."""
        try:
            self._socket.start()
        except OSError as error:
            raise LinkError(f"its Unix socket cannot be opened: {error}") from error

    async def open(
        self, welcome: pb.PeerWelcome, lost: Callable[[str], None], rendezvous: Rendezvous
    ) -> ServeLink:
        welcome.shared_memory.socket_path = self._socket.path
        welcome.shared_memory.num_bytes = self._num_bytes
        return OneSidedServeLink(NAME)

    async def close(self) -> None:
        await self._socket.close()
