"""The decode side's stream to one prefill worker: opened in the background, kept, opened again.

1. Wanted: a transfer waits for it. Connecting is tried with back-off until none does.
2. Greeting: PeerHello and PeerWelcome, then the transport's link. Under "auto",
   a link that fails is followed by a handshake without its transport, for a while: once no
   transfer is under way, a stream over another is let go then.
3. Up: messages flow. It ends when either side, the network or the link fails, and
   then counts as wanted anew if transfers wait.
4. Idle for ``idle_s`` without transfers, or refused for good: gone.

A peer is one process: an address together with an epoch. A restarted worker on
the same address is another peer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton import rpc
from baton.config import KvTransferConfig, SessionConfig
from baton.errors import IncompatiblePeerError, InternalError, TransferError
from baton.faults import Faults
from kv_transfer import handshake
from kv_transfer.keys import TransferKey
from kv_transfer.stream import PullStream, RefusedError
from kv_transfer.transports.base import LinkError, PullLink, PullTransport, UnansweredError
from kv_transfer.usable_transports import TransportsByPeer
from kv_transfer.v1 import transfer_pb2 as pb
from kv_transfer.v1.transfer_pb2_grpc import TransferStub

logger = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MOST_S = 1.0


class PeerOwner(Protocol):
    """Who is told what becomes of a peer; all on the event loop."""

    def peer_up(self, peer: PrefillPeer) -> None:
        """Transfers may attach."""

    def peer_received(self, peer: PrefillPeer, response: pb.PullResponse) -> None: ...

    def peer_held_back(self, key: TransferKey, error: InternalError) -> None:
        """A fault point refused to let a message out."""

    def peer_down(self, peer: PrefillPeer, error: TransferError, *, for_good: bool) -> None:
        """The stream is lost or did not come up. ``for_good``: trying again is of no use."""

    def peer_gone(self, peer: PrefillPeer) -> None:
        """Nothing more is heard of it."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What all peers of one decode worker share."""

    identity: handshake.Identity
    secret: str
    config: KvTransferConfig
    session: SessionConfig
    faults: Faults
    transports: dict[str, PullTransport]
    usable: TransportsByPeer
    idle_s: float


class _NextTransportError(Exception):
    """This transport does not work with the peer; another may."""


class PrefillPeer:
    """One prefill process. ``retain`` and ``release`` count the transfers that need it."""

    def __init__(
        self,
        *,
        address: str,
        worker_id: str,
        epoch: bytes,
        settings: PeerSettings,
        owner: PeerOwner,
    ) -> None:
        self.address = address
        self.worker_id = worker_id
        self.epoch = epoch
        self.link: PullLink | None = None
        """Set while the stream is up."""
        self._settings = settings
        self._owner = owner
        self._usable = settings.usable.of((address, epoch))
        self._num_transfers = 0
        self._stream: PullStream | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.task = asyncio.create_task(self._run(), name=f"kv-peer-{worker_id}")

    @property
    def link_to_attach(self) -> PullLink | None:
        """For a transfer that begins: None too where the stream is lost, though nobody has been
        told yet. It waits for the next one then."""
        return None if self._stream is None or self._stream.over else self.link

    def retain(self) -> None:
        self._num_transfers += 1
        self._watch_idleness()

    def release(self) -> None:
        self._num_transfers -= 1
        self._watch_idleness()

    def send(self, key: TransferKey, request: pb.PullRequest) -> None:
        """Never waits; messages leave in this order. Without a stream nothing leaves."""
        if self.link is not None and self._stream is not None:
            self._stream.send(key, request)

    async def close(self) -> None:
        """Returns when every link's operations have ended."""
        self.task.cancel()
        await asyncio.wait((self.task, *self._closing))
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _watch_idleness(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._num_transfers == 0 and self.link is not None:
            loop = asyncio.get_running_loop()
            idle_s = 0.0 if self._usable.is_one_due else self._settings.idle_s
            self._idle_timer = loop.call_later(idle_s, self._let_stream_go)

    def _let_stream_go(self) -> None:
        self.link = None
        if self._stream is not None:
            self._stream.lose("")

    async def _run(self) -> None:
        """Keeps a stream up as long as transfers want one."""
        try:
            delay_s = BACKOFF_FIRST_S
            while self._num_transfers:
                try:
                    await self._connect_and_serve()
                    delay_s = BACKOFF_FIRST_S
                except _NextTransportError as error:
                    logger.warning("%s: %s; trying without it", self._named(), error)
                except TransferError as error:
                    logger.info("%s", error.message)
                    self._owner.peer_down(self, error, for_good=False)
                    if self._num_transfers:
                        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))
                    delay_s = min(2 * delay_s, BACKOFF_MOST_S)
        except RefusedError as refused:
            logger.warning("%s", refused.error.message)
            self._owner.peer_down(self, refused.error, for_good=True)
        except Exception as error:
            logger.exception("the stream to %s failed", self._named())
            failure = TransferError(f"the stream to {self._named()} failed: {error!r}")
            self._owner.peer_down(self, failure, for_good=True)
        finally:
            self._owner.peer_gone(self)
            if self._closing:
                await asyncio.wait(self._closing)

    async def _connect_and_serve(self) -> None:
        """One stream, from its opening to its end. Returns when it was idle; raises
        TransferError, _NextTransportError or RefusedError."""
        settings = self._settings
        channel = rpc.channel(self.address, settings.session)
        stream = PullStream(
            TransferStub(channel).Pull(metadata=rpc.auth_metadata(settings.secret)),
            named=self._named(),
            faults=settings.faults,
            received=lambda response: self._owner.peer_received(self, response),
            held_back=self._owner.peer_held_back,
        )
        link: PullLink | None = None
        try:
            link = await self._greet(stream)
            self._usable.works(link.name)
            self._stream, self.link = stream, link
            self._owner.peer_up(self)
            self._watch_idleness()
            await stream.wait_end()
        finally:
            self.link = None
            if link is not None:
                closing = asyncio.create_task(link.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            await stream.close()
            await channel.close()

    async def _greet(self, stream: PullStream) -> PullLink:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.config.attach_s):
                await settings.faults.wait("decode.greet")
                names = self._usable.names()
                welcome = await self._welcome(stream, names)
                await settings.faults.wait("decode.link")
                return await self._connect(stream, welcome, names)
        except TimeoutError:
            waited = f"did not answer in {settings.config.attach_s:g} s"
            raise TransferError(f"{self._named()} {waited}") from None

    async def _welcome(self, stream: PullStream, names: Sequence[str]) -> pb.PeerWelcome:
        try:
            return await stream.greet(handshake.make_hello(self._settings.identity, names))
        except RefusedError as refused:
            if not (left_out := self._usable.reason):
                raise
            # The peer may want the very one that was left out: next time all are offered.
            self._usable.try_all()
            raise TransferError(f"{refused.error.message} ({left_out})") from refused

    async def _connect(
        self, stream: PullStream, welcome: pb.PeerWelcome, offered: Sequence[str]
    ) -> PullLink:
        settings = self._settings
        name = self._chosen(welcome, offered)
        peer_layout = handshake.layout_of(welcome, settings.identity)
        try:
            return await settings.transports[name].connect(
                welcome, peer_layout, stream.lose, stream.rendezvous
            )
        except LinkError as error:
            if stream.over:
                raise await stream.status() from error
            if name != offered[-1]:
                self._usable.leave_out(name, str(error))
                raise _NextTransportError(f"{name} does not work: {error}") from error
            does_not_work = f"{self._named()}: {name} does not work: {error}"
            if isinstance(error, UnansweredError):
                raise TransferError(does_not_work) from error
            failure = IncompatiblePeerError(does_not_work)
            if name in handshake.SAME_HOST:
                raise RefusedError(failure) from error
            raise failure from error

    def _chosen(self, welcome: pb.PeerWelcome, offered: Sequence[str]) -> str:
        """The transport, if the peer is the right one. Raises RefusedError."""
        if welcome.epoch != self.epoch:
            raise RefusedError(TransferError(f"{self._named()} restarted: its epoch differs"))
        settings = self._settings
        reason = handshake.refuse_welcome(
            welcome, settings.identity, worker_id=self.worker_id, verify=settings.config.verify
        )
        name = welcome.WhichOneof("transport")
        if reason is None and name not in offered:
            reason = f"it chose transport {name}, {' and '.join(offered)} were offered"
        if reason is not None:
            raise RefusedError(IncompatiblePeerError(f"{self._named()}: {reason}"))
        assert name is not None
        return name

    def _named(self) -> str:
        return f"worker {self.worker_id} at {self.address}"
