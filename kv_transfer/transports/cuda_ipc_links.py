"""Hand-off between GPUs of one machine: decode maps the prefill worker's pool and copies, once.

Nothing but the convention keeps a mapping from being written; decode only reads it. How copies
run is in ``copying.py``. The thread that copies waits for each part on the GPU, so a range that
has ended is written to its last byte.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import CheckedBlocks
from kv_transfer.ranges import BlockRange
from kv_transfer.runs import Area, runs
from kv_transfer.transports.base import (
    LinkError,
    PullTransport,
    ServeLink,
    ServeTransport,
    check_offered,
)
from kv_transfer.transports.copying import CopyingPullLink
from kv_transfer.transports.cuda_ipc import Gpu
from kv_transfer.transports.one_sided import OneSidedServeLink
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

logger = logging.getLogger(__name__)

NAME = "cuda_ipc"
AT_ONCE_BYTES = 256 << 20
"""Copied before the thread looks whether it is to stop: a fraction of a millisecond on one GPU,
ten over PCIe."""


class CudaIpcPullLink(CopyingPullLink):
    """One peer's mapped pool, ``source``, in its allocation, which lies at ``mapped`` here."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        gpu: Gpu,
        pool: CheckedBlocks,
        own: Area,
        source: Area,
        mapped: int,
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
        self._gpu = gpu
        self._own = own
        self._source = source
        self._mapped = mapped

    async def close(self) -> None:
        await super().close()
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._gpu.close, self._mapped)
        except LinkError as error:
            logger.warning("a peer's GPU memory stays mapped: %s", error)

    def _copy_part(self, part: BlockRange) -> None:
        layout = self._own.layout
        num_whole = part.num_tokens // layout.block_size
        try:
            for piece in part.parts(max(1, num_whole), layout.block_size):
                into, out_of = runs(piece, self._own, self._source)
                if piece.num_tokens < layout.block_size:  # the valid tokens of each row
                    _, _, _, pitch, _, _ = layout.strides
                    first, start, width = int(into[0, 0]), int(out_of[0, 0]), int(into[0, 1])
                    rows = {"num_rows": len(into), "width": width, "pitch": pitch}
                    self._gpu.copy_rows(first, start, **rows)
                    continue
                for to, begin in zip(into.tolist(), out_of.tolist(), strict=True):
                    self._gpu.copy(to[0], begin[0], to[1])
        finally:
            self._gpu.wait()


class CudaIpcPull(PullTransport):
    """Decode's side."""

    name: ClassVar[str] = NAME

    def __init__(
        self,
        *,
        pool: CheckedBlocks,
        memory: GpuMemory,
        faults: Faults,
    ) -> None:
        self._pool = pool
        self._own = Area(pool.layout, memory.address, memory.device)
        self._faults = faults
        self._gpu: Gpu | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-cuda")

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._get)

    async def connect(
        self,
        welcome: pb.PeerWelcome,
        peer_layout: KvLayout,
        lost: Callable[[str], None],
        rendezvous: Rendezvous,
    ) -> CudaIpcPullLink:
        """That the owner dies is heard of by the stream alone, which ends with it."""
        offered = welcome.cuda_ipc
        check_offered(offered.num_bytes, peer_layout)
        end = offered.offset + offered.num_bytes
        opening = self._executor.submit(self._open, offered.handle, end)
        try:
            gpu, mapped = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_unwanted)
            raise
        return CudaIpcPullLink(
            gpu=gpu,
            pool=self._pool,
            own=self._own,
            source=Area(peer_layout, mapped + offered.offset),
            mapped=mapped,
            executor=self._executor,
            faults=self._faults,
            lost=lost,
        )

    async def close(self) -> None:
        self._executor.shutdown(wait=False)

    def _get(self) -> Gpu:
        """In the thread. Raises LinkError."""
        if self._gpu is None:
            self._gpu = Gpu(self._own.device)
        return self._gpu

    def _open(self, handle: bytes, num_bytes: int) -> tuple[Gpu, int]:
        """In the thread. Raises LinkError."""
        gpu = self._get()
        mapped = gpu.open(handle)
        if (there := gpu.num_bytes(mapped)) < num_bytes:
            gpu.close(mapped)
            raise LinkError(
                f"the peer's allocation has {there} bytes, its pool ends at {num_bytes}"
            )
        return gpu, mapped

    def _close_unwanted(self, opening: Future[tuple[Gpu, int]]) -> None:
        """Of a handshake that was given up, once its thread is done with it."""
        if not opening.cancelled() and opening.exception() is None:
            gpu, mapped = opening.result()
            self._executor.submit(gpu.close, mapped)


class CudaIpcServe(ServeTransport):
    """Prefill's side."""

    name: ClassVar[str] = NAME

    def __init__(self, *, memory: GpuMemory, layout: KvLayout) -> None:
        self._memory = memory
        self._num_bytes = layout.num_bytes
        self._exported: tuple[bytes, int] | None = None

    async def start(self) -> None:
        if self._exported is None:
            self._exported = await asyncio.to_thread(self._export)

    async def open(
        self, welcome: pb.PeerWelcome, lost: Callable[[str], None], rendezvous: Rendezvous
    ) -> ServeLink:
        await self.start()
        assert self._exported is not None
        welcome.cuda_ipc.handle, welcome.cuda_ipc.offset = self._exported
        welcome.cuda_ipc.num_bytes = self._num_bytes
        return OneSidedServeLink(NAME)

    async def close(self) -> None:
        return

    def _export(self) -> tuple[bytes, int]:
        """In a thread. Raises LinkError."""
        return Gpu(self._memory.device).export(self._memory.address)
