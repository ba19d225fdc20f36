"""Hand-off on a prefill worker: offers transfers to the decode workers that pull them.

A decode worker has one too, for what it lends: there *prefill* here is the decode worker, the
source, and *decode* the prefill worker that pulls (docs/adr/0018-prefill-pulls.md).

Everything runs on the event loop; bytes are checksummed and sent in threads.
What a transfer may do next is decided by its machine (``sender.py``), the streams
are ``servicer.py``'s; this file carries out what the machines ask for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio

from baton.config import KvTransferConfig
from baton.errors import (
    BatonError,
    DrainingError,
    IncompatiblePeerError,
    InternalError,
    TransferError,
)
from baton.faults import Faults
from baton.kv_layout import KvLayout
from baton.logprobs import TokenLogprobs
from baton.telemetry import WorkerMetrics
from kv_transfer import handshake, messages, sender
from kv_transfer.connection import DecodeConnection
from kv_transfer.hosts import host_id
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.own_transports import checked_blocks, serve_transports
from kv_transfer.ranges import BlockRange, valid_tokens
from kv_transfer.sender import SenderEffect, SenderState, SendTransfer
from kv_transfer.servicer import PullServicer
from kv_transfer.transports import nixl_links
from kv_transfer.v1 import transfer_pb2 as pb
from kv_transfer.v1.transfer_pb2_grpc import add_TransferServicer_to_server

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Offer:
    """One offered transfer; kept for ``attach_s`` after its end, for a late Attach."""

    machine: SendTransfer
    connection: DecodeConnection | None = None
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """An Attach that came before the offer."""

    connection: DecodeConnection
    start_token: int
    lease_s: float
    timer: asyncio.TimerHandle


class KvSender:
    """The prefill side of the hand-off. All methods and callbacks: on the event loop.

    Args:
        memory: the worker's pool, laid out as ``layout``; the caller closes it, later.
        host: this process's address, for transports that listen.
        on_freed: called with (key, outcome) exactly once per offer, never from
            within a call to this object, when nothing here reads the blocks any
            more. Outcomes: released, lease_expired, aborted, abandoned, peer_lost.
        on_wanted: called with (key, start_token) when a peer attaches to a transfer that
            was not offered; ``offer`` or ``refuse`` answers it. Without it the peer waits
            for an offer that is bound to come.
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
        metrics: WorkerMetrics,
        faults: Faults,
        on_freed: Callable[[TransferKey, str], None],
        on_wanted: Callable[[TransferKey, int], None] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._identity = handshake.Identity(worker_id, epoch, digest, generation, layout, host_id())
        self._attach_s = config.attach_s
        self._config = config
        self._host = host
        self._metrics = metrics
        self._on_freed = on_freed
        self._on_wanted = on_wanted
        self._on_gpu = not isinstance(memory, KvMemory)
        self._pool = checked_blocks(layout, memory)
        self._sizes = sender.SenderSizes(
            layout.block_size, layout.token_bytes, config.attach_s, config.verify
        )
        self._offers: dict[TransferKey, _Offer] = {}
        self._parked: dict[TransferKey, _Parked] = {}
        self._checksums = ThreadPoolExecutor(1, thread_name_prefix="kv-checksum")
        self._num_held = 0
        self._nothing_held = asyncio.Event()
        self._closing = False
        transports = serve_transports(
            name=f"{worker_id}/{epoch.hex()}",
            layout=layout,
            memory=memory,
            secret=secret,
            host=host,
            config=config,
            faults=faults,
        )
        allowed = handshake.allowed_transports(config, on_gpu=self._on_gpu)
        self._servicer = PullServicer(
            identity=self._identity,
            config=config,
            transports={name: each for name, each in transports.items() if name in allowed},
            faults=faults,
            received=self._received,
            held_back=self._held_back,
            lost=self._lost,
        )

    # ------------------------------------------------------------------ for the worker

    def register(self, server: grpc.aio.Server) -> None:
        """Before the server starts."""
        add_TransferServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Peers are refused before. Raises ConfigurationError where the transport that the
        configuration names cannot work here, or the network that it names is missing."""
        handshake.check_transport(self._config, on_gpu=self._on_gpu)
        nixl_links.check(self._config, self._host)
        await self._servicer.start()

    async def close(self) -> None:
        """Aborts what is offered; returns when nothing here reads the pool any more
        and every ``on_freed`` was called."""
        self._closing = True
        for offer in list(self._offers.values()):
            self._apply(offer, offer.machine.abort(self._leaving()))
        await self._servicer.close()
        self._settle()
        await self._nothing_held.wait()
        for offer in self._offers.values():
            if offer.timer is not None:
                offer.timer.cancel()
        self._offers.clear()
        self._checksums.shutdown(wait=False)

    def offer(self, key: TransferKey, *, start_token: int, num_tokens: int) -> None:
        """Announces that this worker computes ``num_tokens`` input tokens of which decode
        holds the first ``start_token``. Attach may have come before."""
        if key in self._offers:
            raise InternalError(f"transfer {key} was offered before")
        machine = SendTransfer(
            key, start_token=start_token, num_tokens=num_tokens, sizes=self._sizes
        )
        offer = self._offers[key] = _Offer(machine)
        self._num_held += 1
        if self._closing:
            self._apply(offer, machine.abort(self._leaving()))
            return
        parked = self._unpark(key)
        if parked is not None:
            self._attach(offer, parked.connection, parked.start_token, parked.lease_s)

    def refuse(self, key: TransferKey, error: BatonError) -> None:
        """Nothing will be offered: who has attached is told ``error``."""
        if (parked := self._unpark(key)) is not None:
            self._refuse(parked.connection, key, error)

    def ready(self, key: TransferKey, end_token: int, block_ids: Sequence[int]) -> None:
        """KV of tokens ``[0, end_token)`` is complete in ``block_ids``, which cover them
        from the input's start and stay untouched until ``on_freed``."""
        offer = self._offers.get(key)
        if offer is not None:
            self._apply(offer, offer.machine.ready(end_token, block_ids))

    def commit(
        self,
        key: TransferKey,
        first_token_id: int,
        first_position: int,
        first_logprobs: TokenLogprobs | None = None,
    ) -> None:
        """The input is computed and its next token sampled: from now on a lease counts."""
        offer = self._offers.get(key)
        if offer is not None:
            effects = offer.machine.commit(
                self._now(), first_token_id, first_position, first_logprobs
            )
            self._apply(offer, effects)

    def abort(self, key: TransferKey, error: BatonError) -> None:
        """The worker gives the transfer up; the peer is told ``error``."""
        offer = self._offers.get(key)
        if offer is not None:
            self._apply(offer, offer.machine.abort(error))

    # --------------------------------------------------------------- from the servicer

    def _received(self, connection: DecodeConnection, request: pb.PullRequest) -> None:
        match request.WhichOneof("body"):
            case "attach":
                self._on_attach(connection, request.attach)
            case "fetch":
                self._on_fetch(connection, request.fetch)
            case "renew":
                lease_s = request.renew.lease_ms / 1000
                if offer := self._attached(connection, request.renew.key):
                    self._apply(offer, offer.machine.renew(self._now(), lease_s))
            case "release":
                self._on_release(connection, request.release)
            case "abandon":
                key = TransferKey.from_proto(request.abandon.key)
                if (parked := self._parked.get(key)) and parked.connection is connection:
                    self._unpark(key)
                if offer := self._attached(connection, request.abandon.key):
                    self._apply(offer, offer.machine.abandon())

    def _on_attach(self, connection: DecodeConnection, message: pb.Attach) -> None:
        key = TransferKey.from_proto(message.key)
        if key.source_epoch != self._identity.epoch or key.destination_epoch != connection.epoch:
            error = IncompatiblePeerError("epoch differs: the transfer is of another process")
            self._refuse(connection, key, error)
            return
        offer = self._offers.get(key)
        lease_s = message.lease_ms / 1000
        if offer is not None:
            if not offer.machine.attached:
                self._attach(offer, connection, message.start_token, lease_s)
        elif self._closing:
            self._refuse(connection, key, self._leaving())
        elif key not in self._parked:
            timer = asyncio.get_running_loop().call_later(self._attach_s, self._park_over, key)
            self._parked[key] = _Parked(connection, message.start_token, lease_s, timer)
            if self._on_wanted is not None:
                self._on_wanted(key, message.start_token)

    def _on_fetch(self, connection: DecodeConnection, message: pb.Fetch) -> None:
        """Every Fetch is answered, by bytes or by filler: its receives are posted."""
        start, end = message.start_token, message.end_token
        layout = self._identity.layout
        if (
            start % layout.block_size
            or not 0 < end - start <= layout.num_blocks * layout.block_size
        ):
            connection.lose(f"malformed Fetch of tokens [{start}, {end})")
        elif offer := self._attached(connection, message.key):
            self._apply(offer, offer.machine.fetch(self._now(), start, end))
        elif connection.link is not None:
            connection.link.send_filler(start, end)

    def _on_release(self, connection: DecodeConnection, message: pb.Release) -> None:
        offer = self._attached(connection, message.key)
        if offer is None:
            return
        machine = offer.machine
        if machine.live and message.num_bytes != machine.num_bytes:
            logger.error(
                "%s: %s says that it received %d bytes of transfer %s, it should be %d",
                self._identity.worker_id, connection.worker_id, message.num_bytes,
                machine.key, machine.num_bytes,
            )  # fmt: skip
        self._apply(offer, machine.release(self._now(), message.num_bytes))

    def _held_back(self, key: TransferKey, error: InternalError) -> None:
        self.abort(key, TransferError(error.message))

    def _lost(self, connection: DecodeConnection) -> None:
        for key in [k for k, parked in self._parked.items() if parked.connection is connection]:
            self._unpark(key)
        for key in list(connection.keys):
            if (offer := self._offers.get(key)) is not None:
                self._apply(offer, offer.machine.peer_lost())

    # ------------------------------------------------------------------------- helpers

    def _leaving(self) -> DrainingError:
        return DrainingError(f"{self._identity.worker_id} is leaving")

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _attached(self, connection: DecodeConnection, key: pb.TransferKey) -> _Offer | None:
        """The transfer, if it was attached on this very stream."""
        offer = self._offers.get(TransferKey.from_proto(key))
        return offer if offer is not None and offer.connection is connection else None

    def _attach(
        self, offer: _Offer, connection: DecodeConnection, start_token: int, lease_s: float
    ) -> None:
        offer.connection = connection
        if offer.machine.state is not SenderState.FREED:
            connection.keys.add(offer.machine.key)
        self._apply(offer, offer.machine.attach(self._now(), start_token, lease_s))

    def _unpark(self, key: TransferKey) -> _Parked | None:
        parked = self._parked.pop(key, None)
        if parked is not None:
            parked.timer.cancel()
        return parked

    def _park_over(self, key: TransferKey) -> None:
        parked = self._parked.pop(key)
        waited = f"the transfer was not offered within {self._attach_s:g} s"
        self._refuse(parked.connection, key, TransferError(waited))

    def _refuse(self, connection: DecodeConnection, key: TransferKey, error: BatonError) -> None:
        logger.warning("%s: transfer %s: %s", self._identity.worker_id, key, error)
        connection.send(key, messages.aborted(key, error))

    def _apply(self, offer: _Offer, effects: Sequence[SenderEffect]) -> None:
        """Carries effects out, in order, and sets the clock for what comes next."""
        key, connection = offer.machine.key, offer.connection
        for effect in effects:
            match effect:
                case sender.ComputeChecksums(blocks):
                    self._start_checksums(offer, blocks)
                case sender.Freed(outcome, num_bytes):
                    self._free(offer, outcome, num_bytes)
                case sender.StartSend(blocks):
                    assert connection is not None
                    assert connection.link is not None
                    connection.link.send(
                        blocks,
                        lambda error: self._apply(offer, offer.machine.operation_ended(error)),
                    )
                case sender.StartFiller(start, end):
                    assert connection is not None
                    assert connection.link is not None
                    connection.link.send_filler(start, end)
                case sender.SendAborted(error):
                    assert connection is not None
                    self._refuse(connection, key, error)
                case _:
                    assert connection is not None
                    connection.send(key, messages.to_decode(key, effect))
        self._arm(offer)

    def _arm(self, offer: _Offer) -> None:
        if offer.machine.state is SenderState.FREED:
            return
        if offer.timer is not None:
            offer.timer.cancel()
        deadline = offer.machine.deadline
        loop = asyncio.get_running_loop()
        offer.timer = None if deadline is None else loop.call_at(deadline, self._tick, offer)

    def _tick(self, offer: _Offer) -> None:
        self._apply(offer, offer.machine.tick(self._now()))

    def _start_checksums(self, offer: _Offer, blocks: BlockRange) -> None:
        size = self._identity.layout.block_size

        def compute() -> list[int]:
            counts = valid_tokens(blocks.start_token, blocks.end_token, size)
            return [
                self._pool.checksum(block, num_tokens)
                for block, num_tokens in zip(blocks.source_blocks, counts, strict=True)
            ]

        def done(future: asyncio.Future[list[int]]) -> None:
            if (error := future.exception()) is not None:
                failure = TransferError(f"checksumming failed: {error!r}")
                self._apply(offer, offer.machine.operation_ended(failure))
            else:
                self._apply(offer, offer.machine.checksummed(blocks, future.result()))

        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._checksums, compute).add_done_callback(done)

    def _free(self, offer: _Offer, outcome: str, num_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        key, connection = offer.machine.key, offer.connection
        if connection is not None:
            connection.keys.discard(key)
            if outcome == "released" and connection.link is not None:
                self._metrics.handoff_bytes[connection.link.name, "sent"].inc(num_bytes)
        if offer.timer is not None:
            offer.timer.cancel()
        offer.timer = loop.call_later(self._attach_s, self._offers.pop, key, None)
        loop.call_soon(self._tell_freed, key, outcome)

    def _tell_freed(self, key: TransferKey, outcome: str) -> None:
        self._num_held -= 1
        self._settle()
        self._on_freed(key, outcome)

    def _settle(self) -> None:
        if self._num_held == 0 and self._closing:
            self._nothing_held.set()
