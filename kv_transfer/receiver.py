"""One transfer on the decode side, as a pure state machine: no I/O and no clock.

1. ``QUEUED``: known, but no destination blocks are set aside. Nothing is sent.
2. ``RESERVED``: the caller set the blocks aside; the stream to the prefill
   worker is awaited, for ``attach_s``.
3. ``RECEIVING``: attached. Ranges are copied as they are announced; the lease is
   renewed every third of it. Once Commit came, the rest must move on at least
   every ``operation_s``, or the copies before it must; before it, prefill computes
   and the caller's deadline is the bound.
4. ``COMMITTING``: Commit came and every byte is copied; Release is sent. The
   lease is renewed no more, so this state ends with it.
5. ``READY``: Release was acknowledged under that lease. The blocks are good.
6. ``CANCELLING``: failed or cancelled, and own copies still write the blocks.
7. ``QUARANTINED``: the same, and those copies cannot be stopped or take longer
   than ``operation_s``. A timeout proves nothing: only their end leads on.
8. ``FREED``: nothing of ours can write the blocks any more.

The lease counts here from when Attach or Renew was given to the stream. One that is late may
find the lease run out at the sender, whose verdict on Release alone counts. The caller moves
the machine by ``reserve`` and ``cancel``, the stream by ``attach`` and ``peer_lost``, the peer
by ``announced``, ``committed``, ``released`` and ``aborted``, the transport by ``copy_ended``,
``copy_before_ended`` and ``cannot_stop``, the clock by ``tick``. What does not fit the state
does nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import BatonError, LeaseExpiredError, TransferError
from baton.logprobs import TokenLogprobs
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange


class ReceiverState(enum.Enum):
    QUEUED = 1
    RESERVED = 2
    RECEIVING = 3
    COMMITTING = 4
    READY = 5
    CANCELLING = 6
    QUARANTINED = 7
    FREED = 8


@dataclass(frozen=True, slots=True)
class SendAttach:
    start_token: int
    lease_ms: int


@dataclass(frozen=True, slots=True)
class SendRenew:
    lease_ms: int


@dataclass(frozen=True, slots=True)
class SendRelease:
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SendAbandon:
    """Tell the peer that nothing more of it is wanted."""


@dataclass(frozen=True, slots=True)
class StartCopy:
    """Copy this range, then call ``copy_ended``, whatever happens meanwhile."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class StopCopies:
    """Ask the transport to stop this transfer's copies; call ``cannot_stop`` if
    it does not know whether they still write."""


@dataclass(frozen=True, slots=True)
class BecameReady:
    first_token_id: int
    first_position: int
    num_received_tokens: int
    first_logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    error: BatonError


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The blocks stay in doubt until ``Drained``."""


@dataclass(frozen=True, slots=True)
class Drained:
    """After a failure or ``cancel``: nothing writes the blocks any more."""


ReceiverEffect = (
    SendAttach
    | SendRenew
    | SendRelease
    | SendAbandon
    | StartCopy
    | StopCopies
    | BecameReady
    | Failed
    | Quarantined
    | Drained
)

_ATTACHED = (ReceiverState.RECEIVING, ReceiverState.COMMITTING)
_LIVE = (ReceiverState.QUEUED, ReceiverState.RESERVED, *_ATTACHED)
_ENDING = (ReceiverState.CANCELLING, ReceiverState.QUARANTINED)


@dataclass(frozen=True, slots=True)
class ReceiverSizes:
    """What the machine must know of the pool and the configuration."""

    block_size: int
    token_bytes: int
    attach_s: float
    lease_s: float
    operation_s: float


class ReceiveTransfer:
    """Every method returns what the caller must now do, in order."""

    def __init__(
        self, key: TransferKey, *, start_token: int, num_tokens: int, sizes: ReceiverSizes
    ) -> None:
        assert start_token % sizes.block_size == 0, "a held prefix is whole blocks"
        assert 0 <= start_token <= num_tokens
        self.key = key
        self.state = ReceiverState.QUEUED
        self._start_token = start_token
        self._num_tokens = num_tokens
        self._sizes = sizes
        self._lease_ms = max(1, int(sizes.lease_s * 1000))
        self._blocks: tuple[int, ...] = ()
        self._unconnected = ""
        self._announced_end = start_token
        self._copied_tokens = 0
        self._copying: set[BlockRange] = set()
        self._commit: tuple[int, int, TokenLogprobs | None] | None = None
        self._attach_until = 0.0
        self._lease_until = 0.0
        self._renew_at = 0.0
        self._progress_until = 0.0
        self._quarantine_at = 0.0

    @property
    def num_bytes(self) -> int:
        """What is to be received."""
        return (self._num_tokens - self._start_token) * self._sizes.token_bytes

    @property
    def live(self) -> bool:
        return self.state in _LIVE

    @property
    def attached(self) -> bool:
        return self.state in _ATTACHED

    @property
    def deadline(self) -> float | None:
        """When ``tick`` must be called, at the latest."""
        if self.state is ReceiverState.RESERVED:
            return self._attach_until
        if self.state is ReceiverState.RECEIVING:
            soonest = min(self._renew_at, self._lease_until)
            return min(soonest, self._progress_until) if self._commit else soonest
        if self.state is ReceiverState.COMMITTING:
            return self._lease_until
        return self._quarantine_at if self.state is ReceiverState.CANCELLING else None

    # ------------------------------------------------- from the caller and the stream

    def reserve(self, now: float, block_ids: Sequence[int]) -> list[ReceiverEffect]:
        """``block_ids`` are set aside for tokens ``[start_token, num_tokens)``."""
        assert self.state is ReceiverState.QUEUED
        needed = -(-(self._num_tokens - self._start_token) // self._sizes.block_size)
        assert len(block_ids) == needed, "one destination block per block of missing tokens"
        self._blocks = tuple(block_ids)
        self._attach_until = now + self._sizes.attach_s
        self.state = ReceiverState.RESERVED
        return []

    def attach(self, now: float) -> list[ReceiverEffect]:
        """The stream to the prefill worker is up."""
        if self.state is not ReceiverState.RESERVED:
            return []
        self.state = ReceiverState.RECEIVING
        self._count_lease_from(now)
        return [SendAttach(self._start_token, self._lease_ms)]

    def not_connected(self, reason: str) -> None:
        """The stream did not come up, this time; for the error, should it never."""
        self._unconnected = f": {reason}"

    def cancel(self, now: float) -> list[ReceiverEffect]:
        return self._end(now, None) if self.live else []

    def fail(self, now: float, error: BatonError) -> list[ReceiverEffect]:
        """Something on this side makes the transfer impossible."""
        return self._end(now, error) if self.live else []

    def peer_lost(self, now: float, error: BatonError) -> list[ReceiverEffect]:
        """The stream is gone, and what was attached on it."""
        return self._end(now, error, tell_peer=False) if self.attached else []

    # ------------------------------------------------------------------ from the peer

    def announced(self, now: float, blocks: BlockRange) -> list[ReceiverEffect]:
        """``blocks`` (no destination yet) are complete at the sender."""
        if self.state is not ReceiverState.RECEIVING or blocks.start_token != self._announced_end:
            return []
        size = self._sizes.block_size
        num_blocks = -(-blocks.num_tokens // size)
        inside = blocks.start_token < blocks.end_token <= self._num_tokens
        whole = blocks.end_token % size == 0 or blocks.end_token == self._num_tokens
        counted = len(blocks.source_blocks) == num_blocks
        if not (inside and whole and counted and len(blocks.checksums) in (0, num_blocks)):
            error = TransferError(
                f"the sender announced {len(blocks.source_blocks)} blocks for tokens "
                f"[{blocks.start_token}, {blocks.end_token}) of {self._num_tokens}"
            )
            return self._end(now, error)
        first = (blocks.start_token - self._start_token) // size
        self._announced_end = blocks.end_token
        self._progress_until = now + self._sizes.operation_s
        copy = BlockRange(
            blocks.start_token,
            blocks.end_token,
            blocks.source_blocks,
            self._blocks[first : first + num_blocks],
            blocks.checksums,
        )
        self._copying.add(copy)
        return [StartCopy(copy)]

    def committed(
        self,
        now: float,
        num_tokens: int,
        first_token_id: int,
        first_position: int,
        first_logprobs: TokenLogprobs | None = None,
    ) -> list[ReceiverEffect]:
        if self.state is not ReceiverState.RECEIVING or self._commit is not None:
            return []
        if num_tokens != self._num_tokens:
            error = TransferError(
                f"the sender has {num_tokens} input tokens, {self._num_tokens} were expected"
            )
            return self._end(now, error)
        self._commit = (first_token_id, first_position, first_logprobs)
        self._progress_until = now + self._sizes.operation_s
        return self._release_when_copied(now)

    def released(self, now: float, *, ok: bool) -> list[ReceiverEffect]:
        """The sender's verdict on Release."""
        if self.state is not ReceiverState.COMMITTING:
            return []
        if not ok:
            error = LeaseExpiredError("the sender's lease had run out before Release")
            return self._end(now, error, tell_peer=False)
        if now >= self._lease_until:
            error = LeaseExpiredError("the lease ran out before Release was acknowledged")
            return self._end(now, error, tell_peer=False)
        assert self._commit is not None
        assert not self._copying, "READY while a copy writes the blocks"
        self.state = ReceiverState.READY
        num_received = self._num_tokens - self._start_token
        token_id, position, logprobs = self._commit
        return [BecameReady(token_id, position, num_received, logprobs)]

    def aborted(self, now: float, error: BatonError) -> list[ReceiverEffect]:
        """The sender gave the transfer up."""
        return self._end(now, error, tell_peer=False) if self.attached else []

    # ------------------------------------------------- from the transport and the clock

    def copy_ended(
        self, now: float, blocks: BlockRange, error: BatonError | None = None
    ) -> list[ReceiverEffect]:
        """The copy of ``blocks`` writes no more; without ``error`` it wrote every byte."""
        assert blocks in self._copying, "a range is copied once"
        self._copying.remove(blocks)
        if self.state in _ENDING:
            if self._copying:
                return []
            self.state = ReceiverState.FREED
            return [Drained()]
        if error is not None:
            return self._end(now, error)
        self._copied_tokens += blocks.num_tokens
        self._progress_until = now + self._sizes.operation_s
        return self._release_when_copied(now)

    def copy_before_ended(self, now: float) -> list[ReceiverEffect]:
        """Of another transfer, posted before all of this one's that have not ended: they take
        turns, and there are only so many."""
        self._progress_until = now + self._sizes.operation_s
        return []

    def cannot_stop(self) -> list[ReceiverEffect]:
        """The transport does not know whether a copy still writes."""
        if self.state is not ReceiverState.CANCELLING:
            return []
        self.state = ReceiverState.QUARANTINED
        return [Quarantined()]

    def tick(self, now: float) -> list[ReceiverEffect]:
        if self.state is ReceiverState.CANCELLING:
            return self.cannot_stop() if now >= self._quarantine_at else []
        if self.state is ReceiverState.RESERVED and now >= self._attach_until:
            waited = f"no connection to the sender in {self._sizes.attach_s:g} s"
            return self._end(now, TransferError(waited + self._unconnected))
        if not self.attached:
            return []
        if now >= self._lease_until:
            return self._end(now, LeaseExpiredError("the lease ran out before Release"))
        if self.state is ReceiverState.COMMITTING:
            return []
        if self._commit is not None and now >= self._progress_until:
            stuck = f"no byte of it moved in {self._sizes.operation_s:g} s"
            return self._end(now, TransferError(stuck))
        if now >= self._renew_at:
            self._count_lease_from(now)
            return [SendRenew(self._lease_ms)]
        return []

    # ------------------------------------------------------------------------ helpers

    def _count_lease_from(self, now: float) -> None:
        lease_s = self._lease_ms / 1000
        self._lease_until = now + lease_s
        self._renew_at = now + lease_s / 3

    def _release_when_copied(self, now: float) -> list[ReceiverEffect]:
        if self._commit is None or self._copied_tokens < self._num_tokens - self._start_token:
            return []
        if now >= self._lease_until:
            return self._end(now, LeaseExpiredError("the lease ran out before the copy was done"))
        self.state = ReceiverState.COMMITTING
        return [SendRelease(self.num_bytes)]

    def _end(
        self, now: float, error: BatonError | None, *, tell_peer: bool = True
    ) -> list[ReceiverEffect]:
        effects: list[ReceiverEffect] = []
        if self.attached and tell_peer:
            effects.append(SendAbandon())
        if error is not None:
            effects.append(Failed(error))
        if not self._copying:
            self.state = ReceiverState.FREED
            return [*effects, Drained()]
        self.state = ReceiverState.CANCELLING
        self._quarantine_at = now + self._sizes.operation_s
        return [*effects, StopCopies()]
