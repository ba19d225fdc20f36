"""The hand-off as workers see it, with no bytes of its own: it keeps the contract of KvSender and
KvReceiver, and each of its moments comes when somebody says so, in any order that may be.

What is copied are the values of ``PretendKv``: a source that its worker has got back meanwhile
gives garbage, and a copy may go on after its transfer was given up, until it has drained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from support.pretend_engine import GARBAGE, PretendKv

from baton.errors import BatonError, TransferError
from baton.worker.inbox import Inbox
from kv_transfer.keys import TransferKey


@dataclass(eq=False)
class Transfer:
    """Both sides of one."""

    key: TransferKey
    num_tokens: int
    start_token: int
    target: PretendKv
    target_blocks: list[int]
    to_decode: Inbox
    decode: Any
    num_copied: int
    """Tokens from the input's start; those that decode held count."""
    live: bool = True
    """On the decode side: neither ready nor given up."""
    drained: bool = False
    """Nothing writes the target any more."""
    source_blocks: list[int] = field(default_factory=list)
    num_ready: int = 0
    first: tuple[int, int] | None = None
    """Token and position, once prefill has committed."""
    offered: bool = False
    aborted: bool = False
    """By prefill."""
    freed: bool = False
    """Prefill has its blocks back, or is about to be told so."""

    @property
    def is_copyable(self) -> bool:
        return not self.drained and self.num_copied < self.num_ready

    @property
    def is_complete(self) -> bool:
        """Release would be acknowledged."""
        alive = self.live and self.offered and not (self.freed or self.aborted)
        return alive and self.first is not None and self.num_copied == self.num_tokens

    @property
    def is_leased(self) -> bool:
        return self.offered and not self.freed


class PretendHandoff:
    """Of one prefill worker and any number of decode workers; it stands for the sender of
    the first itself, ``receiver`` gives those of the others."""

    def __init__(self, source: PretendKv, to_prefill: Inbox) -> None:
        self._source = source
        self._to_prefill = to_prefill
        self.prefill: Any = None
        """The worker that is told what is freed."""
        self.transfers: dict[TransferKey, Transfer] = {}
        self.num_late_writes = 0
        self.num_complete = 0

    def receiver(self, target: PretendKv, inbox: Inbox) -> Receiver:
        return Receiver(self, target, inbox)

    # ------------------------------------------------------------- as a KvSender

    def offer(self, key: TransferKey, *, start_token: int, num_tokens: int) -> None:
        assert key in self.transfers, "prefill began before decode had reserved"
        transfer = self.transfers[key]
        assert not transfer.offered
        assert (start_token, num_tokens) == (transfer.start_token, transfer.num_tokens)
        transfer.offered = True

    def ready(self, key: TransferKey, end_token: int, block_ids: Sequence[int]) -> None:
        transfer = self.transfers[key]
        if not transfer.freed:
            before = transfer.source_blocks
            assert list(block_ids[: len(before)]) == before, "an announced block is another"
            transfer.source_blocks, transfer.num_ready = list(block_ids), end_token

    def commit(self, key: TransferKey, token_id: int, position: int, _: object = None) -> None:
        self.transfers[key].first = token_id, position

    def abort(self, key: TransferKey, error: BatonError) -> None:
        self.transfers[key].aborted = True

    # ------------------------------------------------------------- what may happen

    def moves(self) -> list[Callable[[], None]]:
        """Everything that may come next of the hand-offs under way."""
        found: list[Callable[[], None]] = []
        for transfer in self.transfers.values():
            if transfer.is_copyable:
                found.append(partial(self.copy, transfer))
            if transfer.is_complete:
                found.append(partial(self.complete, transfer))
            if transfer.live:
                found.append(partial(self.fail, transfer))
            elif not transfer.drained:
                found.append(partial(self.drain, transfer))
            if transfer.is_leased:
                found.append(partial(self.lease_ends, transfer))
        return found

    def next_moves(self) -> list[Callable[[], None]]:
        """One of each hand-off, where nothing goes wrong that has not gone wrong before."""
        moves = (self._next_move(transfer) for transfer in self.transfers.values())
        return [move for move in moves if move is not None]

    def _next_move(self, transfer: Transfer) -> Callable[[], None] | None:
        if transfer.aborted and transfer.is_leased:
            return partial(self.lease_ends, transfer)
        if transfer.live:
            if transfer.freed:
                return partial(self.fail, transfer)
            if transfer.is_copyable:
                return partial(self.copy, transfer)
            return partial(self.complete, transfer) if transfer.is_complete else None
        if not transfer.drained:
            return partial(self.drain, transfer)
        return partial(self.lease_ends, transfer) if transfer.is_leased else None

    def copy(self, transfer: Transfer) -> None:
        """All that is announced; also after the transfer was given up."""
        for token in range(transfer.num_copied, transfer.num_ready):
            value = GARBAGE
            if not transfer.freed:
                value = self._source.read(transfer.source_blocks, token)
            transfer.target.write(transfer.target_blocks, token - transfer.start_token, value)
            self.num_late_writes += not transfer.live
        transfer.num_copied = transfer.num_ready

    def complete(self, transfer: Transfer) -> None:
        """Release is acknowledged: both sides go on."""
        assert transfer.first is not None
        self._free(transfer, "released")
        self.num_complete += 1
        transfer.live, transfer.drained = False, True
        num_received = transfer.num_tokens - transfer.start_token
        given = (transfer.key, *transfer.first, num_received)
        transfer.to_decode.post(transfer.decode.handed_over, *given)

    def fail(self, transfer: Transfer) -> None:
        transfer.live = False
        error = TransferError("the hand-off failed")
        transfer.to_decode.post(transfer.decode.handoff_failed, transfer.key, error)

    def drain(self, transfer: Transfer) -> None:
        transfer.drained = True
        transfer.to_decode.post(transfer.decode.drained, transfer.key)

    def lease_ends(self, transfer: Transfer) -> None:
        """Without Release: the peer has gone, or prefill has given it up."""
        self._free(transfer, "lease_expired")

    def _free(self, transfer: Transfer, outcome: str) -> None:
        assert not transfer.freed
        transfer.freed = True
        self._to_prefill.post(self.prefill.freed, transfer.key, outcome)


class Receiver:
    """Stands for one decode worker's KvReceiver."""

    def __init__(self, handoff: PretendHandoff, target: PretendKv, inbox: Inbox) -> None:
        self._handoff = handoff
        self._target = target
        self._inbox = inbox
        self.decode: Any = None
        """The worker that is told what becomes of its transfers."""

    def begin(
        self,
        key: TransferKey,
        *,
        start_token: int,
        num_tokens: int,
        block_ids: Sequence[int],
        **_: object,
    ) -> None:
        assert key not in self._handoff.transfers
        self._handoff.transfers[key] = Transfer(
            key,
            num_tokens,
            start_token,
            self._target,
            list(block_ids),
            self._inbox,
            self.decode,
            num_copied=start_token,
        )

    def cancel(self, key: TransferKey) -> None:
        """Does nothing where the transfer is over."""
        self._handoff.transfers[key].live = False


class PretendPulls:
    """Stands for a prefill worker's KvReceiver, which pulls from any number of decode workers."""

    def __init__(self, target: PretendKv, inbox: Inbox) -> None:
        self._target = target
        self._inbox = inbox
        self._receivers: dict[bytes, Receiver] = {}
        self._lenders: dict[bytes, PretendLender] = {}
        self._heard: Any = None

    def hears(self, worker: Any, pulls: Any) -> None:
        """Who is told what becomes of the pulls."""
        self._heard = SimpleNamespace(
            handed_over=lambda key, *_: worker.pulled(key, time.monotonic()),
            handoff_failed=lambda key, _: pulls.failed(key, time.monotonic()),
            drained=pulls.drained,
        )

    def lender(self, epoch: bytes, source: PretendKv, inbox: Inbox) -> PretendLender:
        """Stands for the KvSender of the decode worker of that epoch."""
        lender = self._lenders[epoch] = PretendLender(source, inbox)
        self._receivers[epoch] = lender.receiver(self._target, self._inbox)
        return lender

    def begin(self, key: TransferKey, *, within_s: float, **given: Any) -> None:
        receiver = self._receivers[key.source_epoch]
        receiver.decode = self._heard
        receiver.begin(key, **given)
        self._lenders[key.source_epoch].ask(key, given["start_token"])

    def cancel(self, key: TransferKey) -> None:
        self._receivers[key.source_epoch].cancel(key)


class PretendLender(PretendHandoff):
    """Offers what it is asked for, or refuses."""

    def __init__(self, source: PretendKv, inbox: Inbox) -> None:
        super().__init__(source, inbox)
        self.prefill = SimpleNamespace(freed=lambda key, _: self.lends.over(key))
        self.lends: Any = None

    def ask(self, key: TransferKey, start_token: int) -> None:
        self._to_prefill.post(lambda: self.lends.asked(key, start_token))

    def refuse(self, key: TransferKey, error: BatonError) -> None:
        if self.transfers[key].live:
            self.fail(self.transfers[key])
