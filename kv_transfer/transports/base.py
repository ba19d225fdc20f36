"""What every transport does, on either side of the hand-off.

The pool is registered once, when a transport is built. Decode connects to a
peer and *pulls*: no peer ever writes another's pool. Posting never blocks the
caller; every posted range ends exactly once, on the event loop. Each side's
transport makes one *link* per peer, which is closed when it is idle or lost.
"""

from __future__ import annotations

import enum
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from baton.errors import TransferError
from baton.kv_layout import KvLayout
from kv_transfer.ranges import BlockRange
from kv_transfer.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.transports.rendezvous import Rendezvous

Ended = Callable[[TransferError | None], None]
"""Called on the event loop: the operation touches the blocks no more. Without an
error it moved every byte."""


OnFatal = Callable[[BaseException], None]
"""Called in a transport's thread: nobody knows any more what is still written, so no block may be
used from then on, and the process has to end."""


class LinkError(Exception):
    """A link cannot be made or is lost; says why."""


class UnansweredError(LinkError):
    """The peer did not answer, this time."""


class Quiescence(enum.Enum):
    """What a transport knows of an operation that it was asked to stop."""

    ENDED = "ended"
    ENDING = "ending"  # it stops by itself, soon
    UNKNOWN = "unknown"  # the peer decides; only ``Ended`` tells


class Operation:
    """A posted range; the handle for ``quiesce``. Made by links only, on the event loop.

    ``number`` grows in the order of posting.
    """

    _numbers = itertools.count()

    def __init__(self, blocks: BlockRange, ended: Ended) -> None:
        self.number = next(self._numbers)
        self.blocks = blocks
        self.ended = ended
        self.stopped = False
        self.finished = False


class PostedOperations:
    """Those of a transport that cannot take back what it has posted. Posting is in another
    thread than asking to stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._posted: set[Operation] = set()

    def __len__(self) -> int:
        """Those that have not ended."""
        return len(self._posted)

    def add(self, operation: Operation) -> None:
        """It is posted next. Raises TransferError where it was stopped before."""
        with self._lock:
            if operation.stopped:
                raise TransferError("the copy was stopped")
            self._posted.add(operation)

    def end(self, operation: Operation) -> None:
        operation.finished = True
        self._posted.discard(operation)

    def stop(self, operation: Operation) -> Quiescence:
        with self._lock:
            operation.stopped = True
            if operation.finished:
                return Quiescence.ENDED
            return Quiescence.UNKNOWN if operation in self._posted else Quiescence.ENDING


def check_offered(num_bytes: int, layout: KvLayout) -> None:
    """Raises LinkError unless the memory that a peer offers is as large as its layout."""
    if num_bytes != layout.num_bytes:
        raise LinkError(f"the peer offers {num_bytes} bytes, its layout has {layout.num_bytes}")


class PullLink(ABC):
    """Decode's connection to one prefill worker's pool."""

    name: ClassVar[str]

    @property
    def queue(self) -> object:
        """What its operations wait in. Links that share one wait for each other's."""
        return self

    @abstractmethod
    def post(self, blocks: BlockRange, *, posted: Callable[[], None], ended: Ended) -> Operation:
        """Copies ``blocks``, after earlier posts.

        ``posted`` is called on the event loop where the sender must be asked for
        the bytes (Fetch); one-sided transports never call it.
        """

    @abstractmethod
    def quiesce(self, operation: Operation) -> Quiescence:
        """Asks for an operation to be stopped, and says what is known of it."""

    @abstractmethod
    async def close(self) -> None:
        """Returns when every posted operation has ended and the peer is let go."""


class PullTransport(ABC):
    """Decode's side of one transport."""

    name: ClassVar[str]

    async def start(self) -> None:
        """Makes it ready now, not at the first peer. Raises LinkError where it cannot work here."""
        return

    @abstractmethod
    async def connect(
        self,
        welcome: pb.PeerWelcome,
        peer_layout: KvLayout,
        lost: Callable[[str], None],
        rendezvous: Rendezvous,
    ) -> PullLink:
        """A link to the peer that sent ``welcome``; ``lost`` is called, with the
        reason, when it breaks by itself. Raises LinkError."""

    @abstractmethod
    async def close(self) -> None:
        """Links are closed before."""


class ServeLink(ABC):
    """Prefill's side of one link."""

    name: ClassVar[str]

    @abstractmethod
    async def connect(self) -> None:
        """Returns once the peer has connected, or at once where none need. Raises LinkError."""

    @abstractmethod
    def send(self, blocks: BlockRange, ended: Ended) -> None:
        """Two-sided transports: sends ``blocks``, for which receives are posted, after
        what was asked for earlier. Never calls ``ended`` from within."""

    @abstractmethod
    def send_filler(self, start_token: int, end_token: int) -> None:
        """Two-sided transports: sends zeros in the place of these tokens."""

    @abstractmethod
    async def close(self) -> None:
        """Returns when no send reads the pool any more."""


class ServeTransport(ABC):
    """Prefill's side of one transport."""

    name: ClassVar[str]

    @abstractmethod
    async def start(self) -> None:
        """Makes it ready for peers. Raises LinkError where it cannot work here."""

    @abstractmethod
    async def open(
        self, welcome: pb.PeerWelcome, lost: Callable[[str], None], rendezvous: Rendezvous
    ) -> ServeLink:
        """A link for one peer; fills in the transport's part of ``welcome``."""

    @abstractmethod
    async def close(self) -> None:
        """Links are closed before."""
