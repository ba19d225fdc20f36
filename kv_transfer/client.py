"""Hand-off on a decode worker: pulls the KV of finished prefills into blocks set aside for it.

A prefill worker has one too, for what decode workers lend it: there *decode* here is the prefill
worker, the destination, and *prefill* who lends (docs/adr/0018-prefill-pulls.md).

Everything runs on the event loop; bytes are copied in threads. What a transfer
may do next is decided by its machine (``receiver.py``), the streams are
``peer.py``'s; this file carries out what the machines ask for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import Counter

from baton.config import KvTransferConfig, SessionConfig
from baton.errors import (
    BatonError,
    CancelledError,
    ConfigurationError,
    DrainingError,
    IncompatiblePeerError,
    InternalError,
    TransferError,
    from_code,
)
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from kv_transfer import handshake, messages, receiver
from kv_transfer.blocks import CopyBlocks
from kv_transfer.hosts import host_id
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.own_transports import pull_transports
from kv_transfer.peer import PeerSettings, PrefillPeer
from kv_transfer.ranges import BlockRange
from kv_transfer.receiver import ReceiverEffect, ReceiverState, ReceiveTransfer
from kv_transfer.transports import nixl_links
from kv_transfer.transports.base import LinkError, OnFatal, Operation, PullLink, Quiescence
from kv_transfer.usable_transports import TransportsByPeer
from kv_transfer.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

logger = logging.getLogger(__name__)

IDLE_S = 60.0
"""How long a stream is kept for the next transfer."""


@dataclass(slots=True, eq=False)
class _Transfer:
    machine: ReceiveTransfer
    peer: PrefillPeer
    link: PullLink | None = None
    """The one it attached on; a later stream's link is another."""
    operations: dict[BlockRange, Operation] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    holds_peer: bool = True
    patience: asyncio.TimerHandle | None = None
    committed_at: float | None = None
    """By ``perf_counter``: an event loop's clock may count whole milliseconds."""
    outcome: str = ""
    """What a failure counts as, where it is no error: cancelled (by the peer), late, connecting."""


def _only_logged(error: BaseException) -> None:
    """Where there is no worker to end."""


class KvReceiver:
    """The decode side of the hand-off. All methods and callbacks: on the event loop.

    Args:
        memory: the worker's pool, laid out as ``layout``; the caller closes it, later.
        host: this process's address, for transports that listen.
        outcomes: counts the transfers that ended; by default ``metrics.handoffs``.
        on_ready: (key, first_token_id, first_position, num_received_tokens,
            first_logprobs); the blocks are good, and the caller's.
        on_failed: (key, error); the transfer never becomes ready.
        on_fatal: (error), from another thread, before any callback that follows from it: nobody
            knows any more what is still written, so no block may be used from then on, whatever
            callbacks say; the process has to end.
        on_drained: (key), exactly once after ``on_failed`` or ``cancel``: nothing
            writes the blocks any more. Until then they must not be reused.

    No callback is called from within ``begin`` or ``cancel``.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: bytes,
        digest: bytes,
        generation: str,
        layout: KvLayout,
        memory: KvMemory | GpuMemory,
        secret: str,
        config: KvTransferConfig,
        session: SessionConfig,
        metrics: WorkerMetrics,
        faults: Faults,
        on_ready: Callable[[TransferKey, int, int, int, TokenLogprobs | None], None],
        on_failed: Callable[[TransferKey, BatonError], None],
        on_drained: Callable[[TransferKey], None],
        on_fatal: OnFatal = _only_logged,
        host: str = "127.0.0.1",
        copy_blocks: CopyBlocks | None = None,
        outcomes: Callable[[str], Counter] | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        self._epoch = epoch
        self._host = host
        self._worker_id = worker_id
        self._metrics = metrics
        self._outcomes = outcomes or metrics.handoffs
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._on_drained = on_drained
        self._on_fatal = on_fatal
        self._sizes = receiver.ReceiverSizes(
            layout.block_size,
            layout.token_bytes,
            config.attach_s,
            config.lease_s,
            config.operation_s,
        )
        self._on_gpu = not isinstance(memory, KvMemory)
        transports = pull_transports(
            name=f"{worker_id}/{epoch.hex()}/pull",
            layout=layout,
            memory=memory,
            secret=secret,
            host=host,
            config=config,
            faults=faults,
            on_fatal=on_fatal,
            copy_blocks=copy_blocks,
        )
        identity = handshake.Identity(worker_id, epoch, digest, generation, layout, host_id())
        self._settings = PeerSettings(
            identity=identity,
            secret=secret,
            config=config,
            session=session,
            faults=faults,
            transports=transports,
            usable=TransportsByPeer(handshake.allowed_transports(config, on_gpu=self._on_gpu)),
            idle_s=idle_s,
        )
        self._peers: dict[tuple[str, bytes], PrefillPeer] = {}
        self._leaving: set[PrefillPeer] = set()
        self._transfers: dict[TransferKey, _Transfer] = {}
        self._num_undrained = 0
        self._all_drained = asyncio.Event()
        self._closing = False

    # ------------------------------------------------------------------ for the worker

    async def start(self) -> None:
        """Peers are connected to when a transfer first needs them. Raises ConfigurationError
        where the transport or the network that the configuration names cannot work here."""
        config = self._settings.config
        handshake.check_transport(config, on_gpu=self._on_gpu)
        nixl_links.check(config, self._host)
        for name in handshake.required_transports(config):
            try:
                await self._settings.transports[name].start()
            except LinkError as error:
                raise ConfigurationError(f"kv_transfer requires {name}: {error}") from error

    async def close(self) -> None:
        """Fails what is under way; returns when nothing here writes the pool any more
        and every callback was called."""
        self._closing = True
        for transfer in list(self._transfers.values()):
            error = DrainingError(f"{self._worker_id} is leaving")
            self._apply(transfer, transfer.machine.fail(self._now(), error))
        for peer in [*self._peers.values(), *self._leaving]:
            await peer.close()
        self._settle()
        await self._all_drained.wait()
        for transport in self._settings.transports.values():
            await transport.close()

    def begin(
        self,
        key: TransferKey,
        *,
        address: str,
        source_worker_id: str,
        start_token: int,
        num_tokens: int,
        block_ids: Sequence[int],
        within_s: float | None = None,
    ) -> None:
        """Pulls tokens ``[start_token, num_tokens)`` into ``block_ids``, which are the
        caller's again at ``on_ready`` or ``on_drained``.

        Args:
            address: ``host:port`` of the prefill worker's Transfer service.
            within_s: of a pull that nobody needs: it fails where it is not ready by then,
                and at once where the peer has yet to be connected to, which is begun.
        """
        if key in self._transfers:
            raise InternalError(f"transfer {key} was begun before")
        machine = ReceiveTransfer(
            key, start_token=start_token, num_tokens=num_tokens, sizes=self._sizes
        )
        peer = self._peer(address, source_worker_id, key.source_epoch)
        peer.retain()
        transfer = self._transfers[key] = _Transfer(machine, peer)
        self._num_undrained += 1
        self._apply(transfer, machine.reserve(self._now(), block_ids))
        if within_s is not None:
            loop = asyncio.get_running_loop()
            transfer.patience = loop.call_later(within_s, self._late, transfer, within_s)
        refusal: BatonError | None = None
        if self._closing:
            refusal = DrainingError(f"{self._worker_id} is leaving")
        elif key.destination_epoch != self._epoch:
            refusal = IncompatiblePeerError("epoch differs: the transfer is of another process")
        if refusal is not None:
            asyncio.get_running_loop().call_soon(self._fail, transfer, refusal)
        elif (link := peer.link_to_attach) is not None:
            self._attach(transfer, link)
        elif within_s is not None:
            transfer.outcome = "connecting"
            self.connect(address, source_worker_id, key.source_epoch)
            refusal = TransferError(f"{source_worker_id} is being connected to")
            asyncio.get_running_loop().call_soon(self._fail, transfer, refusal)

    def connect(self, address: str, source_worker_id: str, epoch: bytes) -> None:
        """Connects to a peer, in the background, for a transfer that may come."""
        peer = self._peer(address, source_worker_id, epoch)
        peer.retain()
        asyncio.get_running_loop().call_later(self._sizes.attach_s, peer.release)

    def cancel(self, key: TransferKey) -> None:
        """Gives a transfer up, in any state; nothing happens where it is over."""
        transfer = self._transfers.get(key)
        if transfer is not None and transfer.machine.live:
            self._outcomes("cancelled").inc()
            self._apply(transfer, transfer.machine.cancel(self._now()))

    # ------------------------------------------------------------------- from the peers

    def peer_up(self, peer: PrefillPeer) -> None:
        for transfer in self._of(peer):
            link = peer.link_to_attach
            if transfer.machine.state is ReceiverState.RESERVED and link is not None:
                self._attach(transfer, link)

    def peer_down(self, peer: PrefillPeer, error: TransferError, *, for_good: bool) -> None:
        for transfer in self._of(peer):
            if for_good:
                self._fail(transfer, error)
            elif transfer.machine.attached:
                self._apply(transfer, transfer.machine.peer_lost(self._now(), error))
            else:
                transfer.machine.not_connected(error.message)

    def peer_gone(self, peer: PrefillPeer) -> None:
        if self._peers.get((peer.address, peer.epoch)) is peer:
            del self._peers[peer.address, peer.epoch]
        # Its links may still wait for copies to end.
        self._leaving.add(peer)
        peer.task.add_done_callback(lambda task: self._leaving.discard(peer))

    def peer_held_back(self, key: TransferKey, error: InternalError) -> None:
        if (transfer := self._transfers.get(key)) is not None:
            self._fail(transfer, TransferError(error.message))

    def peer_received(self, peer: PrefillPeer, response: pb.PullResponse) -> None:
        """A message that names no transfer of this stream is late, and is dropped."""
        kind = response.WhichOneof("body")
        if kind is None or kind == "welcome":
            return
        transfer = self._transfers.get(TransferKey.from_proto(getattr(response, kind).key))
        if transfer is None or transfer.link is not peer.link:
            return
        machine, now = transfer.machine, self._now()
        match kind:
            case "ready":
                effects = machine.announced(now, messages.announced(response.ready))
            case "commit":
                record = response.commit
                transfer.committed_at = transfer.committed_at or time.perf_counter()
                effects = machine.committed(
                    now,
                    record.num_tokens,
                    record.first_token_id,
                    record.first_position,
                    messages.first_logprobs(record),
                )
            case "released":
                effects = machine.released(now, ok=response.released.ok)
            case "aborted":
                error = from_code(response.aborted.error_code, response.aborted.error_message)
                if isinstance(error, CancelledError):
                    # Whoever cancelled it there knows, or the request has ended with its
                    # first token; for who waits here the hand-off has just failed.
                    transfer.outcome = "cancelled"
                    error = TransferError(f"prefill gave the hand-off up: {error.message}")
                effects = machine.aborted(now, error)
        self._apply(transfer, effects)

    # ------------------------------------------------------------------------- helpers

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _peer(self, address: str, worker_id: str, epoch: bytes) -> PrefillPeer:
        peer = self._peers.get((address, epoch))
        if peer is None:
            peer = PrefillPeer(
                address=address,
                worker_id=worker_id,
                epoch=epoch,
                settings=self._settings,
                owner=self,
            )
            self._peers[address, epoch] = peer
        return peer

    def _of(self, peer: PrefillPeer) -> list[_Transfer]:
        return [each for each in self._transfers.values() if each.peer is peer]

    def _attach(self, transfer: _Transfer, link: PullLink) -> None:
        transfer.link = link
        self._apply(transfer, transfer.machine.attach(self._now()))

    def _fail(self, transfer: _Transfer, error: BatonError) -> None:
        self._apply(transfer, transfer.machine.fail(self._now(), error))

    def _late(self, transfer: _Transfer, within_s: float) -> None:
        transfer.outcome = "late"
        self._fail(transfer, TransferError(f"it was not here within {within_s:.3g} s"))

    def _apply(self, transfer: _Transfer, effects: Sequence[ReceiverEffect]) -> None:
        """Carries effects out, in order, and sets the clock for what comes next."""
        key = transfer.machine.key
        for effect in effects:
            match effect:
                case receiver.StartCopy(blocks):
                    self._start_copy(transfer, blocks)
                case receiver.StopCopies():
                    self._stop_copies(transfer)
                case receiver.BecameReady():
                    self._ready(transfer, effect)
                case receiver.Failed(error):
                    level = logging.DEBUG if transfer.outcome else logging.WARNING
                    logger.log(level, "%s: transfer %s: %s", self._worker_id, key, error)
                    self._outcomes(transfer.outcome or error.code).inc()
                    self._on_failed(key, error)
                case receiver.Quarantined():
                    logger.warning(
                        "%s: the blocks of transfer %s are quarantined", self._worker_id, key
                    )
                case receiver.Drained():
                    self._forget(transfer)
                    asyncio.get_running_loop().call_soon(self._tell_drained, key)
                case _:
                    transfer.peer.send(key, messages.to_prefill(key, effect))
        self._arm(transfer)

    def _arm(self, transfer: _Transfer) -> None:
        if transfer.timer is not None:
            transfer.timer.cancel()
        deadline = transfer.machine.deadline
        loop = asyncio.get_running_loop()
        transfer.timer = None if deadline is None else loop.call_at(deadline, self._tick, transfer)
        if transfer.holds_peer and not transfer.machine.live:
            transfer.holds_peer = False
            transfer.peer.release()

    def _tick(self, transfer: _Transfer) -> None:
        self._apply(transfer, transfer.machine.tick(self._now()))

    def _start_copy(self, transfer: _Transfer, blocks: BlockRange) -> None:
        link, peer, key = transfer.link, transfer.peer, transfer.machine.key
        assert link is not None

        def posted() -> None:
            # Also for a cancelled transfer: its posted receives end no other way.
            if peer.link is link:
                peer.send(key, messages.fetch(key, blocks))

        def ended(error: TransferError | None) -> None:
            number = transfer.operations.pop(blocks).number
            self._apply(transfer, transfer.machine.copy_ended(self._now(), blocks, error))
            self._take_turns(link.queue, number)

        try:
            transfer.operations[blocks] = link.post(blocks, posted=posted, ended=ended)
        except Exception as error:
            self._on_fatal(error)  # it may be posted or not, and nobody will say when it ends
            raise

    def _take_turns(self, queue: object, number: int) -> None:
        """A copy of that number has ended: those that wait there behind it have moved up."""
        for other in list(self._transfers.values()):
            oldest = next(iter(other.operations.values()), None)
            if other.link is None or other.link.queue is not queue:
                continue
            if oldest is not None and oldest.number > number:
                self._apply(other, other.machine.copy_before_ended(self._now()))

    def _stop_copies(self, transfer: _Transfer) -> None:
        assert transfer.link is not None
        known = [transfer.link.quiesce(each) for each in transfer.operations.values()]
        if Quiescence.UNKNOWN in known:
            self._apply(transfer, transfer.machine.cannot_stop())

    def _ready(self, transfer: _Transfer, effect: receiver.BecameReady) -> None:
        machine, link = transfer.machine, transfer.link
        assert link is not None
        assert transfer.committed_at is not None
        self._metrics.handoff_seconds.observe(time.perf_counter() - transfer.committed_at)
        self._metrics.handoff_bytes[link.name, "received"].inc(machine.num_bytes)
        self._outcomes("ready").inc()
        self._forget(transfer)
        self._num_undrained -= 1
        self._settle()
        self._on_ready(
            machine.key,
            effect.first_token_id,
            effect.first_position,
            effect.num_received_tokens,
            effect.first_logprobs,
        )

    def _forget(self, transfer: _Transfer) -> None:
        del self._transfers[transfer.machine.key]
        if transfer.patience is not None:
            transfer.patience.cancel()

    def _tell_drained(self, key: TransferKey) -> None:
        self._num_undrained -= 1
        self._settle()
        self._on_drained(key)

    def _settle(self) -> None:
        if self._closing and self._num_undrained == 0:
            self._all_drained.set()
