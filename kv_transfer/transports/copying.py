"""A link on which decode copies by itself, in a thread: memory that both processes can reach.

All copies of one decode worker run in one thread, in the order in which they were posted, with
the GIL released. A writer cannot reach decode's pool, so a prefill worker that is stopped and
wakes can do no harm.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from baton.errors import TransferError
from baton.faults import Faults
from kv_transfer.blocks import CheckedBlocks
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import Ended, LinkError, Operation, PullLink, Quiescence


class CopyingPullLink(PullLink):
    """``at_once_bytes`` are copied in one go; between two the thread looks whether it is to stop.

    No frame but the link may name the source: one that an error keeps would keep the peer's memory.
    """

    def __init__(
        self,
        *,
        pool: CheckedBlocks,
        executor: ThreadPoolExecutor,
        faults: Faults,
        lost: Callable[[str], None],
        at_once_bytes: int,
    ) -> None:
        self._pool = pool
        self._executor = executor
        self._faults = faults
        self._lost = lost
        self._num_at_once = max(1, at_once_bytes // pool.layout.block_bytes)
        self._copies: set[asyncio.Future[None]] = set()
        self._closed = False

    @property
    def queue(self) -> object:
        return self._executor

    def post(self, blocks: BlockRange, *, posted: object, ended: Ended) -> Operation:
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
        await asyncio.gather(*self._copies, return_exceptions=True)
        self._closed = True

    @abstractmethod
    def _copy_part(self, part: BlockRange) -> None:
        """In the copying thread: returns when every byte of it is in the pool. A LinkError means
        that the link is of no more use."""

    def _copy(self, operation: Operation) -> None:
        """In the copying thread."""
        self._faults.hit("decode.copy")
        if self._closed:
            raise TransferError("the link is closed")
        for part in operation.blocks.parts(self._num_at_once, self._pool.layout.block_size):
            if operation.stopped:
                raise TransferError("the copy was stopped")
            self._copy_part(part)
            self._pool.verify_all(part)

    def _end(self, operation: Operation, copy: asyncio.Future[None]) -> None:
        self._copies.discard(copy)
        operation.finished = True
        error = copy.exception()
        if isinstance(error, LinkError):
            self._lost(str(error))
        if error is not None and not isinstance(error, TransferError):
            error = TransferError(f"the copy failed: {error!r}")
        operation.ended(error)
