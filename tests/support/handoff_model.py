"""A small world in which both machines of the hand-off meet: memory, a channel, a clock.

The channel loses, repeats and reorders; processes restart; copies and sends
take as many steps as the driver likes. Every step is one of ``actions()``, so a
driver (hypothesis, or a seeded random walk) is a list of choices. The world
checks itself as it goes, and ``settle`` asserts that everything ends in time.

Memory is a word per token. ``truth(serial, token)`` is the only right value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from baton.errors import TransferError
from kv_transfer import receiver as rx
from kv_transfer import sender as tx
from kv_transfer.keys import TransferKey
from kv_transfer.ranges import BlockRange

BLOCK_SIZE = 4
TOKEN_BYTES = 10
ATTACH_S, LEASE_S, OPERATION_S = 7.0, 6.0, 5.0
GARBAGE, CANARY, ZERO = -1, -2, 0
Message = tuple[str, TransferKey, tuple[object, ...]]
Action = Callable[[], None]


def truth(serial: int, token: int) -> int:
    return serial * 1000 + token + 1


@dataclass(eq=False)
class Copy:
    """One range on its way. ``sent`` is None until a two-sided sender sends it."""

    blocks: BlockRange
    began: float
    sent: str | None
    moved: int = 0


@dataclass(eq=False)
class Outgoing:
    machine: tx.SendTransfer
    serial: int
    start_token: int
    num_tokens: int
    block_ids: list[int]
    memory: dict[int, list[int]]
    computed: int = 0
    freed: list[str] = field(default_factory=list)
    sends: list[Copy] = field(default_factory=list)
    checksums: list[BlockRange] = field(default_factory=list)
    ended_at: float | None = None
    committed: bool = False


@dataclass(eq=False)
class Incoming:
    machine: rx.ReceiveTransfer
    serial: int
    start_token: int
    num_tokens: int
    memory: list[list[int]]
    writes: dict[int, int] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    source: Outgoing | None = None
    lease_until: float = 0.0
    failed: int = 0
    cancelled: int = 0
    drained: int = 0
    ready: int = 0


class World:
    """``sender_class`` and ``receiver_class`` may be mutants."""

    def __init__(
        self,
        *,
        two_sided: bool = False,
        verify: bool = False,
        sender_class: type[tx.SendTransfer] = tx.SendTransfer,
        receiver_class: type[rx.ReceiveTransfer] = rx.ReceiveTransfer,
    ) -> None:
        self.two_sided = two_sided
        self.verify = verify
        self.sender_class = sender_class
        self.receiver_class = receiver_class
        self.now = 0.0
        self.serial = 0
        self.epochs = [b"p0", b"d0"]
        self.outgoing: dict[TransferKey, Outgoing] = {}
        self.incoming: dict[TransferKey, Incoming] = {}
        self.past: list[Outgoing | Incoming] = []
        self.to_sender: list[Message] = []
        self.to_receiver: list[Message] = []
        self.num_ready = 0

    # ------------------------------------------------------------------- what may happen

    def act(self, choice: int) -> None:
        """Does one of the things that may happen now, drawn by their weights."""
        options = self.actions()
        at = choice % sum(weight for weight, _ in options)
        for weight, action in options:
            at -= weight
            if at < 0:
                return action()

    def actions(self) -> list[tuple[int, Action]]:
        """Everything that may happen now. Catastrophes are rare, so that much gets done."""
        some: list[tuple[int, Action]] = [(8, self.begin)] if self.serial < 4 else []
        for pipe in (self.to_sender, self.to_receiver):
            if pipe:
                some.append((30, partial(self.deliver, pipe, 0)))
                some.append((2, partial(self.deliver, pipe, -1)))
                some.append((2, partial(self.repeat, pipe)))
                some.append((3, partial(self.lose, pipe)))
        for out in self.outgoing.values():
            some += self._outgoing_actions(out)
        for inc in self.incoming.values():
            some += self._incoming_actions(inc)
        some += [(5, partial(self.pass_time, 0.4)), (4, partial(self.pass_time, 2.1))]
        some += [(1, self.restart_sender), (1, self.restart_receiver), (1, self.lose_stream)]
        return some

    def _outgoing_actions(self, out: Outgoing) -> list[tuple[int, Action]]:
        if out.checksums:
            return [(10, partial(self.finish_checksum, out))]
        if out.machine.state is tx.SenderState.COMPUTING:
            some: list[tuple[int, Action]] = [(6, partial(self.compute, out, 5))]
            return [*some, (2, partial(self.compute, out, 100)), (1, partial(self.abort, out))]
        return []

    def _incoming_actions(self, inc: Incoming) -> list[tuple[int, Action]]:
        some: list[tuple[int, Action]] = []
        if inc.machine.state is rx.ReceiverState.RESERVED:
            some.append((10, partial(self.attach, inc)))
        if inc.machine.live:
            some.append((1, partial(self.cancel, inc)))
        for copy in inc.copies:
            if copy.moved == copy.blocks.num_tokens:
                some.append((15, partial(self.end_copy, inc, copy)))
                continue
            some.append((1, partial(self.end_copy, inc, copy)))
            if copy.sent is not None:
                some.append((10, partial(self.move, inc, copy, 3)))
                some.append((5, partial(self.move, inc, copy, 100)))
        return some

    # -------------------------------------------------------------------------- actions

    def begin(self) -> None:
        """A request is offered on one side and begun on the other."""
        serial = self.serial = self.serial + 1
        num_tokens = (11, 8, 4)[serial % 3]
        start = (4, 0, 4)[serial % 3]
        key = TransferKey(bytes([serial]), 0, self.epochs[0], self.epochs[1])
        memory = {block: [GARBAGE] * BLOCK_SIZE for block in range(100, 104)}
        at_once = (1 << 20, BLOCK_SIZE * TOKEN_BYTES)[serial % 2]
        sizes = tx.SenderSizes(BLOCK_SIZE, TOKEN_BYTES, ATTACH_S, self.verify, at_once)
        send = self.sender_class(key, start_token=start, num_tokens=num_tokens, sizes=sizes)
        self.outgoing[key] = Outgoing(send, serial, start, num_tokens, list(memory), memory)
        needs = rx.ReceiverSizes(BLOCK_SIZE, TOKEN_BYTES, ATTACH_S, LEASE_S, OPERATION_S)
        machine = self.receiver_class(key, start_token=start, num_tokens=num_tokens, sizes=needs)
        inc = Incoming(machine, serial, start, num_tokens, [[CANARY] * BLOCK_SIZE for _ in "12345"])
        inc.source = self.outgoing[key]
        self.incoming[key] = inc
        needed = -(-(num_tokens - start) // BLOCK_SIZE)
        self.act_in(inc, machine.reserve(self.now, range(1, 1 + needed)))

    def compute(self, out: Outgoing, num_tokens: int) -> None:
        end = min(out.num_tokens, out.computed + num_tokens)
        for token in range(out.computed, end):
            block, slot = divmod(token, BLOCK_SIZE)
            out.memory[out.block_ids[block]][slot] = truth(out.serial, token)
        out.computed = end
        self.act_out(out, out.machine.ready(end, out.block_ids))
        if end == out.num_tokens and out.machine.state is tx.SenderState.COMPUTING:
            out.committed = True
            self.act_out(out, out.machine.commit(self.now, out.serial + 70, 0))

    def finish_checksum(self, out: Outgoing) -> None:
        blocks = out.checksums.pop(0)
        sums = [1] * len(blocks.source_blocks)
        self.act_out(out, out.machine.checksummed(blocks, sums))

    def move(self, inc: Incoming, copy: Copy, num_tokens: int) -> None:
        """The transport moves some tokens of what lies in the source now."""
        blocks, out = copy.blocks, inc.source
        assert out is not None
        end = min(blocks.num_tokens, copy.moved + num_tokens)
        for at in range(copy.moved, end):
            block, slot = divmod(at, BLOCK_SIZE)
            value = out.memory[blocks.source_blocks[block]][slot]
            assert blocks.start_token >= inc.start_token, "moved what was held"
            assert not inc.drained, "a copy wrote after the blocks were drained"
            inc.memory[blocks.blocks[block]][slot] = ZERO if copy.sent == "filler" else value
            token = blocks.start_token + at
            inc.writes[token] = inc.writes.get(token, 0) + 1
        copy.moved = end

    def end_copy(self, inc: Incoming, copy: Copy) -> None:
        """The copy ends: well if every token moved, with an error otherwise."""
        inc.copies.remove(copy)
        complete = copy.moved == copy.blocks.num_tokens
        error = None if complete else TransferError("the operation failed")
        out = inc.source
        if out is not None and copy in out.sends:
            out.sends.remove(copy)
            if self.outgoing.get(out.machine.key) is out:
                self.act_out(out, out.machine.operation_ended(error))
        self.act_in(inc, inc.machine.copy_ended(self.now, copy.blocks, error))

    def abort(self, out: Outgoing) -> None:
        self.act_out(out, out.machine.abort(TransferError("given up")))

    def attach(self, inc: Incoming) -> None:
        self.act_in(inc, inc.machine.attach(self.now))

    def cancel(self, inc: Incoming) -> None:
        inc.cancelled += 1
        self.act_in(inc, inc.machine.cancel(self.now))

    def deliver(self, pipe: list[Message], index: int) -> None:
        kind, key, values = pipe.pop(index)
        if pipe is self.to_sender:
            out = self.outgoing.get(key)
            if out is not None:
                self._deliver_to_sender(out, kind, values)
        else:
            inc = self.incoming.get(key)
            if inc is not None:
                self._deliver_to_receiver(inc, kind, values)

    def repeat(self, pipe: list[Message]) -> None:
        pipe.insert(1, pipe[0])

    def lose(self, pipe: list[Message]) -> None:
        pipe.pop(0)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for out in list(self.outgoing.values()):
            if out.machine.deadline is not None and self.now >= out.machine.deadline:
                self.act_out(out, out.machine.tick(self.now))
        for inc in list(self.incoming.values()):
            if inc.machine.deadline is not None and self.now >= inc.machine.deadline:
                self.act_in(inc, inc.machine.tick(self.now))
            for copy in list(inc.copies):
                if self.now >= copy.began + OPERATION_S:
                    self.end_copy(inc, copy)

    def restart_sender(self) -> None:
        """The process is killed; a segment that is still mapped keeps what lay in it."""
        self.past += self.outgoing.values()
        self.outgoing = {}
        self.epochs[0] += b"'"

    def restart_receiver(self) -> None:
        for inc in self.incoming.values():
            for copy in inc.copies:
                out = inc.source
                if out is not None and copy in out.sends:
                    out.sends.remove(copy)
                    if self.outgoing.get(out.machine.key) is out:
                        error = TransferError("peer died")
                        self.act_out(out, out.machine.operation_ended(error))
        self.incoming = {}
        self.epochs[1] += b"'"

    def lose_stream(self) -> None:
        """Both sides learn of it; what was under way may still arrive."""
        for out in list(self.outgoing.values()):
            self.act_out(out, out.machine.peer_lost())
        for inc in list(self.incoming.values()):
            self.act_in(inc, inc.machine.peer_lost(self.now, TransferError("stream lost")))

    # ------------------------------------------------------------------------- messages

    def _deliver_to_sender(self, out: Outgoing, kind: str, values: tuple[object, ...]) -> None:
        machine, now = out.machine, self.now
        if kind == "attach":
            self.act_out(out, machine.attach(now, *values))  # type: ignore[arg-type]
        elif kind == "renew":
            self.act_out(out, machine.renew(now, *values))  # type: ignore[arg-type]
        elif kind == "fetch":
            self.act_out(out, machine.fetch(now, *values))  # type: ignore[arg-type]
        elif kind == "release":
            self.act_out(out, machine.release(now, *values))  # type: ignore[arg-type]
        else:
            self.act_out(out, machine.abandon())

    def _deliver_to_receiver(self, inc: Incoming, kind: str, values: tuple[object, ...]) -> None:
        machine, now = inc.machine, self.now
        if kind == "ready":
            self.act_in(inc, machine.announced(now, *values))  # type: ignore[arg-type]
        elif kind == "commit":
            self.act_in(inc, machine.committed(now, *values))  # type: ignore[arg-type]
        elif kind == "released":
            self.act_in(inc, machine.released(now, ok=bool(values[0])))
        else:
            self.act_in(inc, machine.aborted(now, *values))  # type: ignore[arg-type]

    # -------------------------------------------------------------------------- effects

    def act_out(self, out: Outgoing, effects: list[tx.SenderEffect]) -> None:
        key = out.machine.key
        for effect in effects:
            match effect:
                case tx.SendReady(blocks):
                    self._check_announced(out, blocks)
                    self.to_receiver.append(("ready", key, (blocks,)))
                case tx.SendCommit(num_tokens, token_id, position):
                    self.to_receiver.append(("commit", key, (num_tokens, token_id, position)))
                case tx.SendReleased(ok):
                    self.to_receiver.append(("released", key, (ok,)))
                case tx.SendAborted(error):
                    self.to_receiver.append(("aborted", key, (error,)))
                case tx.ComputeChecksums(blocks):
                    out.checksums.append(blocks)
                case tx.StartSend(blocks):
                    self._start_send(out, (blocks.start_token, blocks.end_token), "blocks")
                case tx.StartFiller(start, end):
                    self._start_send(out, (start, end), "filler")
                case tx.Freed(outcome, num_bytes):
                    self._free(out, outcome, num_bytes)

    def _check_announced(self, out: Outgoing, blocks: BlockRange) -> None:
        for at, token in enumerate(range(blocks.start_token, blocks.end_token)):
            block, slot = divmod(at, BLOCK_SIZE)
            value = out.memory[blocks.source_blocks[block]][slot]
            assert value == truth(out.serial, token), "announced before it was computed"

    def _start_send(self, out: Outgoing, span: tuple[int, int], what: str) -> None:
        """Finds the receives that were posted for it; a repeated Fetch finds none."""
        for inc in self.incoming.values():
            for copy in inc.copies:
                same = (copy.blocks.start_token, copy.blocks.end_token) == span
                if inc.source is out and same and copy.sent is None:
                    copy.sent = what
                    if what == "blocks":
                        out.sends.append(copy)
                    return
        if what == "blocks":
            self.act_out(out, out.machine.operation_ended(TransferError("the peer is gone")))

    def _free(self, out: Outgoing, outcome: str, num_bytes: int) -> None:
        assert not out.sends, "freed while a send reads the blocks"
        assert not out.checksums, "freed while a checksum reads the blocks"
        out.freed.append(outcome)
        assert len(out.freed) == 1, "freed twice"
        moved = (out.num_tokens - out.start_token) * TOKEN_BYTES
        assert num_bytes == (moved if outcome == "released" else 0)
        for values in out.memory.values():  # the blocks are another request's at once
            values[:] = [GARBAGE] * BLOCK_SIZE

    def act_in(self, inc: Incoming, effects: list[rx.ReceiverEffect]) -> None:
        key = inc.machine.key
        for effect in effects:
            match effect:
                case rx.SendAttach(start_token, lease_ms):
                    inc.lease_until = self.now + lease_ms / 1000
                    self.to_sender.append(("attach", key, (start_token, lease_ms / 1000)))
                case rx.SendRenew(lease_ms):
                    inc.lease_until = self.now + lease_ms / 1000
                    self.to_sender.append(("renew", key, (lease_ms / 1000,)))
                case rx.SendRelease(num_bytes):
                    needed = inc.num_tokens - inc.start_token
                    assert num_bytes == needed * TOKEN_BYTES, "needed minus held, exactly"
                    self.to_sender.append(("release", key, (num_bytes,)))
                case rx.SendAbandon():
                    self.to_sender.append(("abandon", key, ()))
                case rx.StartCopy(blocks):
                    self._start_copy(inc, blocks)
                case rx.StopCopies():
                    if self.two_sided:
                        self.act_in(inc, inc.machine.cannot_stop())
                case rx.BecameReady():
                    self._check_ready(inc, effect)
                case rx.Failed():
                    inc.failed += 1
                    assert inc.failed == 1
                    assert not inc.ready
                    assert not inc.cancelled
                case rx.Drained():
                    assert not inc.copies, "drained while a copy writes the blocks"
                    assert inc.failed or inc.cancelled
                    inc.drained += 1
                    assert inc.drained == 1

    def _start_copy(self, inc: Incoming, blocks: BlockRange) -> None:
        sent = None if self.two_sided else "blocks"
        inc.copies.append(Copy(blocks, self.now, sent))
        if self.two_sided:
            span = (blocks.start_token, blocks.end_token)
            self.to_sender.append(("fetch", inc.machine.key, span))

    def _check_ready(self, inc: Incoming, effect: rx.BecameReady) -> None:
        """Invariants 2 and 7: every byte once and right, none outside, only what was needed."""
        inc.ready += 1
        self.num_ready += 1
        assert inc.ready == 1, "ready twice"
        assert not inc.failed
        assert not inc.cancelled
        assert not inc.copies, "ready while a copy writes the blocks"
        assert self.now < inc.lease_until, "ready under a lease that ran out"
        out = inc.source
        assert out is not None
        assert out.machine.outcome == "released", "ready without the sender's acknowledgement"
        needed = range(inc.start_token, inc.num_tokens)
        assert inc.writes == dict.fromkeys(needed, 1), "not every byte was written exactly once"
        expected = [CANARY] * BLOCK_SIZE + [truth(inc.serial, token) for token in needed]
        flat = [value for block in inc.memory for value in block]
        rest = [CANARY] * (len(flat) - len(expected))
        assert flat == expected + rest, "ready with bytes that the source does not have"
        assert effect.num_received_tokens == len(needed)
        assert effect.first_token_id == inc.serial + 70

    # ------------------------------------------------------------------------- the end

    def settle(self) -> None:
        """Invariant 5: with no message delivered any more, everything ends in time."""
        for out in self.outgoing.values():
            if out.machine.state is tx.SenderState.COMPUTING:  # the request's deadline
                self.act_out(out, out.machine.abort(TransferError("deadline")))
        for inc in self.incoming.values():
            if inc.machine.state is rx.ReceiverState.RECEIVING and inc.machine._commit is None:
                self.cancel(inc)
        bound = self.now + max(ATTACH_S, 2 * LEASE_S) + 2 * OPERATION_S
        while self.now < bound:
            for out in self.outgoing.values():
                while out.checksums:
                    self.finish_checksum(out)
            self.pass_time(0.5)
        for out in self.outgoing.values():
            assert out.machine.state is tx.SenderState.FREED, out.machine.state
            assert len(out.freed) == 1
        for inc in self.incoming.values():
            ended = (rx.ReceiverState.READY, rx.ReceiverState.FREED)
            assert inc.machine.state in ended, inc.machine.state
            assert inc.ready + inc.drained == 1
            assert inc.drained == 0 or inc.failed + inc.cancelled == 1
