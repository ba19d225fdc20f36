"""Hand-off on one host: decode maps the prefill worker's pool and copies, once.

The mapping is read-only. How copies run is in ``copying.py``.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import PoolView
from kv_transfer.memory import KvMemory, map_read_only
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import (
    LinkError,
    PullTransport,
    ServeLink,
    ServeTransport,
    check_offered,
)
from kv_transfer.transports.copying import CopyingPullLink
from kv_transfer.transports.memory_socket import MemorySocket, fetch_memory, wait_readable
from kv_transfer.transports.one_sided import OneSidedServeLink
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

NAME = "shared_memory"
AT_ONCE_BYTES = 32 << 20
"""Copied in one go, in some four milliseconds; between two the GIL is taken, which costs a request
of 1,000 tokens of a small model a tenth of its time where it has to be done twice more. Where there
is no kernel that copies, it is taken between blocks too."""


class SharedMemoryPullLink(CopyingPullLink):
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
        super().__init__(
            pool=pool,
            executor=executor,
            faults=faults,
            lost=lost,
            at_once_bytes=AT_ONCE_BYTES,
        )
        self._own = pool
        self._source: PoolView | None = source
        self._connection = connection
        self._watch = asyncio.ensure_future(self._watch_owner())

    async def close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await super().close()
        # The peer's memory goes now, though errors and their frames may name this link for long.
        self._source = None
        self._connection.close()

    def _copy_part(self, part: BlockRange) -> None:
        assert self._source is not None, "the link is open"
        self._own.copy_range(self._source, part)

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
