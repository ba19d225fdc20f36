"""Hand-off between hosts over NIXL and UCX: RDMA where there is any, TCP elsewhere.

Prefill registers its pool and says where it lies. Decode reads blocks out of it, in one
thread for all its peers (``nixl_reader.py``). A read under way cannot be called back, by
either side: its blocks are in doubt until it has ended.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from baton.config import KvTransferConfig
from baton.errors import ConfigurationError, TransferError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import CheckedBlocks
from kv_transfer.memory import KvMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.runs import Area, runs
from kv_transfer.transports import nixl, ucx
from kv_transfer.transports.base import (
    Ended,
    LinkError,
    OnFatal,
    Operation,
    PostedOperations,
    PullLink,
    PullTransport,
    Quiescence,
    ServeLink,
    ServeTransport,
    check_offered,
)
from kv_transfer.transports.nixl_reader import Peer, Reader
from kv_transfer.transports.one_sided import OneSidedServeLink
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

NAME = "nixl"

_T = TypeVar("_T")


def installed() -> bool:
    """Whether this process could use NIXL; imports nothing."""
    return nixl.package() is not None


def check(config: KvTransferConfig, host: str) -> None:
    """Raises ConfigurationError where RDMA is required and this worker, at ``host``, has none
    or lacks what would use it."""
    if config.network != "rdma" or config.transport not in ("auto", NAME):
        return
    if not installed():
        raise ConfigurationError(
            "kv_transfer.network is rdma, which needs the package nixl-cu12: "
            "pip install 'baton[nixl]', or set kv_transfer.network to any",
            param="kv_transfer.network",
        )
    try:
        ucx.environment(host, config.network, os.environ)
    except LinkError as error:
        raise ConfigurationError(str(error), param="kv_transfer.network") from error


class NixlPullLink(PullLink):
    """One peer's registered pool."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        reader: Reader,
        peer: Peer,
        pool: CheckedBlocks,
        target: Area,
        source: Area,
        faults: Faults,
        lost: Callable[[str], None],
    ) -> None:
        self._reader = reader
        self._peer = peer
        self._pool = pool
        self._target = target
        self._source = source
        self._faults = faults
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._posted = PostedOperations()
        self._unfinished: set[Operation] = set()
        self._all_finished = asyncio.Event()
        self._all_finished.set()
        self._closed = False

    @property
    def queue(self) -> object:
        return self._reader

    def post(self, blocks: BlockRange, *, posted: Callable[[], None], ended: Ended) -> Operation:
        operation = Operation(blocks, ended)
        self._unfinished.add(operation)
        self._all_finished.clear()
        try:
            # Here, while the reader's thread copies what was posted before.
            into, out_of = runs(blocks, self._target, self._source)
        except Exception as error:  # a peer's announcement may be about anything
            self._loop.call_soon(self._end, operation, error)
            return operation
        self._reader.read(
            self._peer,
            into,
            out_of,
            about_to=partial(self._about_to, operation),
            finished=partial(self._finished, operation),
            stalled=self._stalled,
        )
        return operation

    def quiesce(self, operation: Operation) -> Quiescence:
        """What is posted to NIXL goes on, whatever is done to it."""
        return self._posted.stop(operation)

    async def close(self) -> None:
        self._closed = True
        await self._all_finished.wait()
        self._reader.let_go(self._peer)

    def _about_to(self, operation: Operation) -> None:
        """In the reader's thread, right before the range is read."""
        self._faults.hit("decode.copy")
        if self._closed:
            raise TransferError("the copy was stopped")
        self._posted.add(operation)

    def _finished(self, operation: Operation, error: Exception | None) -> None:
        """In the reader's thread."""
        try:
            if error is None:
                self._pool.verify_all(operation.blocks)
        except TransferError as corrupt:
            error = corrupt
        self._loop.call_soon_threadsafe(self._end, operation, error)

    def _stalled(self, reason: str) -> None:
        """In the reader's thread."""
        self._loop.call_soon_threadsafe(self._lost, reason)

    def _end(self, operation: Operation, error: Exception | None) -> None:
        self._posted.end(operation)
        self._unfinished.discard(operation)
        if not self._unfinished:
            self._all_finished.set()
        if isinstance(error, LinkError):
            self._lost(str(error))
            error = TransferError(str(error))
        elif error is not None and not isinstance(error, TransferError):
            error = TransferError(f"the copy failed: {error!r}")
        operation.ended(error)


class _Answer(Generic[_T]):
    """A value that another thread gives, once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[_T] = self._loop.create_future()

    def give(self, value: _T) -> None:
        self._loop.call_soon_threadsafe(self._future.set_result, value)

    async def wait(self) -> _T:
        """May be given up and called again."""
        return await asyncio.shield(self._future)

    def then(self, call: Callable[[_T], None]) -> None:
        self._future.add_done_callback(lambda future: call(future.result()))


class NixlPull(PullTransport):
    """Decode's side.

    Args:
        name: of this process's agent.
        host: this process's own address.
        on_fatal: see ``Reader``.
    """

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        name: str,
        pool: CheckedBlocks,
        memory: KvMemory | GpuMemory,
        host: str,
        config: KvTransferConfig,
        faults: Faults,
        on_fatal: OnFatal,
    ) -> None:
        self._pool = pool
        self._target = nixl.area_of(pool.layout, memory)
        self._timeout_s = config.operation_s
        self._faults = faults
        self._closed: _Answer[None] | None = None
        self._reader = Reader(
            partial(_make_agent, name, pool.layout, memory, host, config, serves=False),
            stall_s=config.operation_s,
            on_fatal=on_fatal,
        )

    async def start(self) -> None:
        """Raises LinkError."""
        made = _Answer[LinkError | None]()
        self._reader.start(made.give)
        if (error := await made.wait()) is not None:
            raise error

    async def connect(
        self,
        welcome: pb.PeerWelcome,
        peer_layout: KvLayout,
        lost: Callable[[str], None],
        rendezvous: Rendezvous,
    ) -> NixlPullLink:
        offered = welcome.nixl
        check_offered(offered.num_bytes, peer_layout)
        await self.start()
        source = Area(peer_layout, offered.pool_address, offered.device)
        return NixlPullLink(
            reader=self._reader,
            peer=await self._peer(offered, source),
            pool=self._pool,
            target=self._target,
            source=source,
            faults=self._faults,
            lost=lost,
        )

    async def close(self) -> None:
        if self._closed is None:
            self._closed = _Answer[None]()
            self._reader.close(partial(self._closed.give, None))
        await self._closed.wait()

    async def _peer(self, offered: pb.Nixl, source: Area) -> Peer:
        made = _Answer[Peer | LinkError]()
        self._reader.connect(
            offered.agent_name,
            offered.agent_metadata,
            source,
            timeout_s=self._timeout_s,
            made=made.give,
        )
        try:
            peer = await made.wait()
        except asyncio.CancelledError:
            made.then(self._let_go)  # whoever wanted it has given up
            raise
        if isinstance(peer, LinkError):
            raise peer
        return peer

    def _let_go(self, peer: Peer | LinkError) -> None:
        if isinstance(peer, Peer):
            self._reader.let_go(peer)


class NixlServe(ServeTransport):
    """Prefill's side; see ``NixlPull`` for its arguments."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        name: str,
        memory: KvMemory | GpuMemory,
        layout: KvLayout,
        host: str,
        config: KvTransferConfig,
    ) -> None:
        self._make = partial(_make_agent, name, layout, memory, host, config, serves=True)
        self._num_bytes = layout.num_bytes
        self._making = asyncio.Lock()
        self._agent: nixl.Agent | None = None

    async def start(self) -> None:
        await self._get()

    async def open(
        self, welcome: pb.PeerWelcome, lost: Callable[[str], None], rendezvous: Rendezvous
    ) -> ServeLink:
        agent = await self._get()
        welcome.nixl.agent_name = agent.name
        welcome.nixl.agent_metadata = agent.metadata
        welcome.nixl.pool_address = agent.area.address
        welcome.nixl.num_bytes = self._num_bytes
        welcome.nixl.device = agent.area.device
        return OneSidedServeLink(NAME)

    async def close(self) -> None:
        async with self._making:
            if self._agent is not None:
                await asyncio.get_running_loop().run_in_executor(None, self._agent.close)
                self._agent = None

    async def _get(self) -> nixl.Agent:
        """This process's agent, made when it is first needed. Raises LinkError."""
        async with self._making:
            if self._agent is None:
                loop = asyncio.get_running_loop()
                self._agent = await loop.run_in_executor(None, self._make)
            return self._agent


def _make_agent(
    name: str,
    layout: KvLayout,
    memory: KvMemory | GpuMemory,
    host: str,
    config: KvTransferConfig,
    *,
    serves: bool,
) -> nixl.Agent:
    """For a thread. Raises LinkError."""
    variables = ucx.environment(host, config.network, os.environ)
    return nixl.Agent(name, layout=layout, memory=memory, environment=variables, serves=serves)
