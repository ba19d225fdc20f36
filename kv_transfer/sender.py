"""One transfer on the prefill side, as a pure state machine: no I/O and no clock.

1. ``COMPUTING``: the worker offered the transfer and computes its input. Chunks
   are announced as they are complete; the blocks are the computing sequence's.
2. ``LEASED``: the worker committed. The blocks are kept for the receiver until
   the lease runs out; only the receiver's Attach and Renew move its end, later.
3. ``DRAINING``: the outcome is decided, but an operation of ours (a send, a
   checksum) still reads the blocks.
4. ``FREED``: nobody reads the blocks. The machine stays as a tombstone that
   answers a late Attach.

The worker moves it by ``ready``, ``commit`` and ``abort``, the peer by ``attach``,
``fetch``, ``renew``, ``release``, ``abandon`` and by its loss, the clock by
``tick``. COMPUTING lasts as long as the worker computes (a request's deadline
aborts it); LEASED ends by ``deadline``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from baton.errors import BatonError, LeaseExpiredError, TransferError
from baton.logprobs import TokenLogprobs
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange

Outcome = Literal["released", "lease_expired", "aborted", "abandoned", "peer_lost"]


class SenderState(enum.Enum):
    COMPUTING = 1
    LEASED = 2
    DRAINING = 3
    FREED = 4


@dataclass(frozen=True, slots=True)
class SendReady:
    """Tell the peer that these blocks are complete."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class SendCommit:
    """Tell the peer that all tokens are ready, and the first sampled token."""

    num_tokens: int
    first_token_id: int
    first_position: int
    first_logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SendReleased:
    """Acknowledge Release; not ``ok`` means that the copy is worthless."""

    ok: bool


@dataclass(frozen=True, slots=True)
class SendAborted:
    """Tell the peer that nothing more will come."""

    error: BatonError


@dataclass(frozen=True, slots=True)
class ComputeChecksums:
    """Compute them, then call ``checksummed``, whatever happens meanwhile."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class StartSend:
    """Two-sided transports: send these blocks, then call ``operation_ended``."""

    blocks: BlockRange


@dataclass(frozen=True, slots=True)
class StartFiller:
    """Two-sided transports: the peer has posted receives for tokens that it can
    no longer have. Send zeros of the same size, so that they end and the pair
    stays in order; the peer discards them."""

    start_token: int
    end_token: int


@dataclass(frozen=True, slots=True)
class Freed:
    """No operation of ours reads the blocks. ``num_bytes`` were handed over."""

    outcome: Outcome
    num_bytes: int


SenderEffect = (
    SendReady
    | SendCommit
    | SendReleased
    | SendAborted
    | ComputeChecksums
    | StartSend
    | StartFiller
    | Freed
)


ANNOUNCED_BYTES = 64 << 20
"""The most of one announcement: it is copied as one, within the receiver's bound on an operation,
and a cached prefix may be gigabytes."""


@dataclass(frozen=True, slots=True)
class SenderSizes:
    """What the machine must know of the pool and the configuration."""

    block_size: int
    token_bytes: int
    attach_s: float
    verify: bool
    announced_bytes: int = ANNOUNCED_BYTES


class SendTransfer:
    """Every method returns what the caller must now do, in order."""

    def __init__(
        self, key: TransferKey, *, start_token: int, num_tokens: int, sizes: SenderSizes
    ) -> None:
        assert start_token % sizes.block_size == 0, "a held prefix is whole blocks"
        assert 0 <= start_token <= num_tokens
        self.key = key
        self.state = SenderState.COMPUTING
        self.outcome: Outcome | None = None
        self.attached = False
        self._start_token = start_token
        self._num_tokens = num_tokens
        self._sizes = sizes
        self._ready_end = start_token
        self._announced: list[BlockRange] = []
        self._announced_end = start_token
        self._fetched: set[tuple[int, int]] = set()
        self._commit: SendCommit | None = None
        self._commit_sent = False
        self._lease_s = 0.0
        self._lease_until = 0.0
        self._operations = 0
        self._error: BatonError | None = None

    @property
    def num_bytes(self) -> int:
        """What the receiver lacks."""
        return (self._num_tokens - self._start_token) * self._sizes.token_bytes

    @property
    def live(self) -> bool:
        """Neither freed nor about to be."""
        return self.state in (SenderState.COMPUTING, SenderState.LEASED)

    @property
    def deadline(self) -> float | None:
        """When ``tick`` must be called, at the latest."""
        return self._lease_until if self.state is SenderState.LEASED else None

    # ------------------------------------------------------------- from the worker

    def ready(self, end_token: int, block_ids: Sequence[int]) -> list[SenderEffect]:
        """KV of tokens ``[0, end_token)`` is complete in ``block_ids``."""
        if self.state is not SenderState.COMPUTING:
            return []
        assert end_token <= self._num_tokens, "more tokens than were offered"
        size = self._sizes.block_size
        # A block that is still being filled is announced when it is full, or last.
        end = end_token if end_token == self._num_tokens else end_token // size * size
        start = self._ready_end
        if end <= start:
            return []
        assert len(block_ids) >= -(-end // size), "block_ids covers the input from its start"
        self._ready_end = end
        blocks = BlockRange(start, end, tuple(block_ids[start // size : -(-end // size)]))
        num_at_once = max(1, self._sizes.announced_bytes // (size * self._sizes.token_bytes))
        effects: list[SenderEffect] = []
        for part in blocks.parts(num_at_once, size):
            if self._sizes.verify:
                self._operations += 1
                effects.append(ComputeChecksums(part))
            else:
                effects += self._announce(part)
        return effects

    def checksummed(self, blocks: BlockRange, checksums: Sequence[int]) -> list[SenderEffect]:
        """The answer to ComputeChecksums; answers come in order."""
        effects: list[SenderEffect] = []
        if self.live:
            effects = self._announce(replace(blocks, checksums=tuple(checksums)))
        return effects + self.operation_ended()

    def commit(
        self,
        now: float,
        first_token_id: int,
        first_position: int,
        first_logprobs: TokenLogprobs | None = None,
    ) -> list[SenderEffect]:
        """The whole input is computed and its next token sampled: the lease begins."""
        if self.state is not SenderState.COMPUTING:
            return []
        assert self._ready_end == self._num_tokens, "committed before every token was ready"
        self.state = SenderState.LEASED
        self._commit = SendCommit(self._num_tokens, first_token_id, first_position, first_logprobs)
        kept_s = self._lease_s if self.attached else self._sizes.attach_s
        self._lease_until = max(self._lease_until, now + kept_s)
        return self._commit_when_announced()

    def abort(self, error: BatonError) -> list[SenderEffect]:
        """The worker gives the transfer up."""
        return self._end("aborted", error) if self.live else []

    def operation_ended(self, error: TransferError | None = None) -> list[SenderEffect]:
        """One send or checksum no longer reads the blocks."""
        assert self._operations > 0
        self._operations -= 1
        if error is not None and self.live:
            return self._end("aborted", error)
        if self.state is SenderState.DRAINING and self._operations == 0:
            return self._free()
        return []

    # --------------------------------------------------------------- from the peer

    def attach(self, now: float, start_token: int, lease_s: float) -> list[SenderEffect]:
        if self.attached:
            return []
        effects = self._expire_if_due(now)
        self.attached = True
        if not self.live:
            return [*effects, SendAborted(self._error or TransferError("the transfer is over"))]
        if start_token != self._start_token:
            return self._end(
                "aborted",
                TransferError(
                    f"prefill was told that decode holds {self._start_token} tokens, "
                    f"decode says {start_token}"
                ),
            )
        self._lease_s = lease_s
        if self.state is SenderState.LEASED:
            self._lease_until = max(self._lease_until, now + lease_s)
        effects += [SendReady(blocks) for blocks in self._announced]
        return effects + self._commit_when_announced()

    def fetch(self, now: float, start_token: int, end_token: int) -> list[SenderEffect]:
        """The peer has posted receives for one announced range."""
        effects = self._expire_if_due(now)
        span = (start_token, end_token)
        if span in self._fetched:
            return effects
        self._fetched.add(span)
        for blocks in self._announced:
            if self.live and (blocks.start_token, blocks.end_token) == span:
                self._operations += 1
                return [*effects, StartSend(blocks)]
        if self.live:
            effects += self._end("aborted", TransferError(f"tokens {span} were never announced"))
        return [*effects, StartFiller(start_token, end_token)]

    def renew(self, now: float, lease_s: float) -> list[SenderEffect]:
        effects = self._expire_if_due(now)
        if self.live and self.attached:
            self._lease_until = max(self._lease_until, now + lease_s)
        return effects

    def release(self, now: float, num_bytes: int) -> list[SenderEffect]:
        """Every byte is copied. The lease decides whether the copy counts."""
        if not self._commit_sent:
            return []
        effects = self._expire_if_due(now)
        if self.state is not SenderState.LEASED:
            late = self.outcome != "released"
            return [*effects, SendReleased(ok=False)] if late else effects
        if num_bytes != self.num_bytes:
            error = TransferError(f"{num_bytes} bytes were received, {self.num_bytes} were offered")
            return [*self._end("aborted", error), SendReleased(ok=False)]
        return [SendReleased(ok=True), *self._end("released")]

    def abandon(self) -> list[SenderEffect]:
        return self._end("abandoned") if self.live and self.attached else []

    def peer_lost(self) -> list[SenderEffect]:
        return self._end("peer_lost") if self.live and self.attached else []

    # -------------------------------------------------------------- from the clock

    def tick(self, now: float) -> list[SenderEffect]:
        return self._expire_if_due(now)

    # --------------------------------------------------------------------- helpers

    def _announce(self, blocks: BlockRange) -> list[SenderEffect]:
        self._announced.append(blocks)
        self._announced_end = blocks.end_token
        if not self.attached:
            return []
        return [SendReady(blocks), *self._commit_when_announced()]

    def _commit_when_announced(self) -> list[SenderEffect]:
        if self._commit is None or not self.attached or self._commit_sent:
            return []
        if self._announced_end < self._num_tokens:
            return []
        self._commit_sent = True
        return [self._commit]

    def _expire_if_due(self, now: float) -> list[SenderEffect]:
        if self.state is not SenderState.LEASED or now < self._lease_until:
            return []
        waited = "its lease ran out" if self.attached else "nobody attached to it in time"
        return self._end("lease_expired", LeaseExpiredError(f"the transfer is over: {waited}"))

    def _end(self, outcome: Outcome, error: BatonError | None = None) -> list[SenderEffect]:
        """``error`` is what the peer is told, now or when it attaches late."""
        self.outcome = outcome
        self._error = error
        told: list[SenderEffect] = [SendAborted(error)] if error and self.attached else []
        if self._operations:
            self.state = SenderState.DRAINING
            return told
        return told + self._free()

    def _free(self) -> list[SenderEffect]:
        assert self.outcome is not None
        self.state = SenderState.FREED
        return [Freed(self.outcome, self.num_bytes if self.outcome == "released" else 0)]
