"""The worlds of ``block_world.py`` with the real hand-off between the workers: KvSender and
KvReceiver with their machines, servicer, peers and streams, each process on an event loop of
its own. In memory are the stream (``memory_stream.py``) and, as there, model and gateway.

Streams lose, repeat and reorder messages and say again what was said on another; processes are
stopped, go on, and are killed, after which another with a new epoch has their address.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from support.block_world import (
    BLOCK_SIZE,
    BlockWorld,
    Choice,
)
from support.hand_loop import Clock
from support.memory_stream import (
    Wire,
)
from support.wired_process import DecodeProcess, PrefillProcess, Process

from baton.v1 import session_pb2 as pb
from decode_workers.worker import DecodeWorker
from engine.kv_cache.kv_cache import KvCache
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from kv_transfer.service import KvSender
from prefill_workers.worker import PrefillWorker

TICK_S = 0.1
SETTLES_WITHIN = 150
"""Ticks. Leases, attachments and operations end within 20, and there may be some of each."""
_KEPT = 30
"""Messages that may be said again."""


class WiredWorld(BlockWorld):
    """The classes may be mutants. ``knows``: the transport says that what it stops will end.
    ``verify``: blocks are checksummed before they are announced."""

    def __init__(self, *, knows: bool = True, verify: bool = False, **classes: Any) -> None:
        self.classes: dict[str, Any] = {
            "kv": KvCache,
            "prefill": PrefillWorker,
            "decode": DecodeWorker,
            "sender": KvSender,
            "receiver": KvReceiver,
        } | classes
        self.knows, self.verify = knows, verify
        self.clock = Clock()
        self.numbers = iter(range(10**6))
        self.memories: dict[bytes, Any] = {}
        self.wires: list[Wire] = []
        self.said: list[tuple[str, Any]] = []
        self.num_lost = 0
        self.released: set[TransferKey] = set()
        """Of which a sender has acknowledged Release."""
        self.choices = []
        self.seen = Counter()
        self._of_key = {}
        self.prefill = PrefillProcess(self)  # type: ignore[assignment]
        self.decodes = [DecodeProcess(self, n) for n in range(2)]  # type: ignore[misc]

    @property
    def sides(self) -> list[Any]:  # type: ignore[override]
        return [self.prefill, *self.decodes]

    def handoff_of(self, choice: Choice, decode: int) -> tuple[TransferKey, pb.Handoff]:
        """Every attempt has the same transfer id, so that what is late fits but for the rest."""
        prefill: Any = self.prefill
        epochs = prefill.epoch, self.sides[1 + decode].epoch
        handoff = pb.Handoff(prefill_transfer_address=prefill.name, prefill_worker_id=prefill.name)
        return TransferKey(bytes([choice.number]), choice.num_attempts, *epochs), handoff

    def connect(self, process: Process, address: str) -> Wire:
        prefill: Any = self.prefill
        wire = Wire(process, prefill)
        self.wires.append(wire)
        if process.dead:
            wire.cut()
        return wire

    # ------------------------------------------------------------- what may happen

    def act_at_random(self, dice: random.Random) -> None:
        what = dice.random()
        if what < 0.3:
            dice.choice(self.sides).round()
        elif what < 0.45:
            self.move_on(dice)
        elif what < 0.62:
            self.misdeliver(dice)
        elif what < 0.72:
            self.copy_some(dice)
        elif what < 0.78:
            self.clock.now += dice.choice((0.05, 0.2, 0.7, 1.5))
        elif what < 0.9:
            if len(self.unfinished) < 5:
                num_common, num_own = dice.randrange(4), dice.randint(1, 4)
                prompt = [*range(BLOCK_SIZE * num_common), *[90 + dice.randrange(3)] * num_own]
                num_tokens, decode = dice.randint(1, 8), dice.randrange(2)
                self.arrive(prompt, num_tokens, decode, local=dice.random() < 0.15)
        elif what < 0.965 and self.unfinished:
            choice = dice.choice(self.unfinished)
            act = dice.choice((self.cancel, self.expire, self.attempt, self.attempt))
            if act == self.attempt:
                self.attempt(choice, dice.randrange(2), local=dice.random() < 0.2)
            else:
                act(choice)
        elif what > 0.97:
            self.go_wrong(dice)

    def move_on(self, dice: random.Random) -> None:
        """Everything that is under way arrives, where nobody is stopped."""
        for wire in self.live_wires():
            for pipe, end in ((wire.to_prefill, wire.prefill), (wire.to_decode, wire.decode)):
                while pipe:
                    self._deliver(wire, pipe, 0)
                if not end.stopped:
                    end.loop.run()
        if dice.random() < 0.3:
            self.copy_all()

    def live_wires(self) -> list[Wire]:
        self.wires = [wire for wire in self.wires if wire.end_status is None]
        return self.wires

    def _deliver(self, wire: Wire, pipe: list[Any], index: int) -> None:
        message = wire.deliver(pipe, index)
        wire.greeted = wire.greeted or message.WhichOneof("body") == "welcome"
        self.said.append(("prefill" if pipe is wire.to_prefill else "decode", message))
        del self.said[:-_KEPT]

    def misdeliver(self, dice: random.Random) -> None:
        """One message arrives, as it should, or not, or again, or on another stream."""
        wires = self.live_wires()
        if not wires:
            return
        wire = dice.choice(wires)
        pipe = dice.choice((wire.to_prefill, wire.to_decode))
        how = dice.random()
        if how > 0.75 and self.said:
            self.say_again(wire, *dice.choice(self.said))
        elif pipe and how > 0.7 and pipe[0].WhichOneof("body") not in ("hello", "welcome"):
            pipe.pop(0)
            self.num_lost += 1
            self.seen["lost"] += 1
        elif pipe and how > 0.6:
            self._deliver(wire, pipe, -1)
        elif pipe:
            self._deliver(wire, pipe, 0)
        for end in (wire.prefill, wire.decode):
            if not end.stopped:
                end.loop.run()

    def say_again(self, wire: Wire, to: str, message: Any) -> None:
        """What was delivered before comes on this stream: about no other transfer than the
        one that it names may it change anything, and of one that is over it changes nothing."""
        pipe, end = (wire.to_decode, wire.decode)
        if to == "prefill":
            pipe, end = (wire.to_prefill, wire.prefill)
        if end.stopped or not wire.greeted:
            return
        end.loop.run()
        kind = message.WhichOneof("body")
        is_named = kind not in ("hello", "welcome")
        named = TransferKey.from_proto(getattr(message, kind).key) if is_named else None
        before = end.machines(but=named)
        wire.insert(pipe, message)
        end.loop.run()
        assert end.machines(but=named) == before, "a late message changed another transfer"
        self.seen["said again"] += 1
        self.seen["said again of another attempt"] += any(
            is_named and key.transfer_id == named.transfer_id and key != named for key in before
        )

    def copy_some(self, dice: random.Random) -> None:
        """Or a checksum comes to its end."""
        prefill: Any = self.prefill
        if not prefill.stopped and dice.random() < 0.5 and prefill.loop.finish_thread():
            return
        copies = [copy for side in self.sides if not side.stopped for copy in side.copies]
        if copies:
            copy = dice.choice(copies)
            late = copy.operation not in [
                operation
                for transfer in copy.link.process.receiver._transfers.values()
                for operation in transfer.operations.values()
                if transfer.machine.live
            ]
            self.seen["late writes"] += late
            copy.move(dice.choice((2, 100)))
            if dice.random() < 0.6:
                copy.end()

    def copy_all(self) -> None:
        prefill: Any = self.prefill
        while not prefill.stopped and prefill.loop.finish_thread():
            pass
        for side in self.sides:
            for copy in [] if side.stopped else side.copies:
                copy.move(100)
                copy.end()

    def go_wrong(self, dice: random.Random) -> None:
        side = dice.choice(self.sides)
        acts = (self.lose_session, self.fail_all, self.kill, self.kill, self.stop, self.stop)
        if (wires := self.live_wires()) and dice.random() < 0.3:
            dice.choice(wires).cut()
            self.seen["streams cut"] += 1
        else:
            dice.choice(acts)(side)

    def stop(self, side: Any) -> None:
        """SIGSTOP, or SIGCONT where it is stopped."""
        side.stopped = not side.stopped
        self.seen["stops"] += side.stopped

    def kill(self, side: Any) -> None:
        """SIGKILL; another process takes its place."""
        self.seen["kills"] += 1
        for choice in self._served_by(side):
            self.give_up(choice, but=side)
        for wire in self.live_wires():
            if side in (wire.prefill, wire.decode):
                wire.cut()
        for copy in side.copies:
            copy.link.copies.remove(copy)
            copy.link.maybe_idle()
        side.kill()
        if side is self.prefill:
            self.prefill = PrefillProcess(self)  # type: ignore[assignment]
        else:
            number = self.decodes.index(side)
            self.decodes[number] = DecodeProcess(self, number)  # type: ignore[assignment]

    # ------------------------------------------------------------- what always holds

    def check(self) -> None:
        self._forget_what_is_over()
        for side in self.sides:
            side.check()
        self.seen["preemptions"] = sum(side.num_preemptions for side in self.sides[1:])

    def settle(self) -> None:
        """Nothing goes wrong any more: every choice gets its whole answer in time, and at
        rest no block is held. A lost message is one that a request's deadline makes good."""
        for side in self.sides:
            side.stopped = False
        for choice in self.unfinished if self.num_lost else ():
            self.give_up(choice)
        for _ in range(SETTLES_WITHIN):
            for choice in self.unfinished:
                if choice.key is None:
                    self.attempt(choice, choice.number % 2, local=choice.number % 4 == 0)
            self.tick()
            self.check()
            if not self.unfinished and all(side.worker.idle for side in self.sides):
                break
        assert not self.unfinished, "somebody waits for ever"
        for side in self.sides:
            side.assert_at_rest()
        self.assert_closes()

    def tick(self) -> None:
        self.clock.now += TICK_S
        for side in self.sides:
            side.round()
        self.move_on(random.Random(0))
        self.copy_all()

    def assert_closes(self) -> None:
        """Each hand-off comes to its end by itself."""
        closing = [side.loop.start(side.close()) for side in self.sides]
        for _ in range(40):
            self.tick()
        assert all(task.done() for task in closing), "a hand-off does not come to its end"
        for task in closing:
            task.result()
        for side in self.sides:
            side.loop.end()

    def end(self) -> None:
        """Lets everything go, in whatever state."""
        for side in [*reversed(self.sides), *self.sides]:  # prefill serves what decode began
            for copy in side.copies:
                copy.link.copies.remove(copy)
                copy.link.maybe_idle()
            side.loop.end()
