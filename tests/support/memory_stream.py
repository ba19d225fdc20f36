"""The hand-off's gRPC stream and its one-sided transport between pretended processes, in memory.

Messages lie on a ``Wire`` until somebody delivers them, loses them, or delivers them twice; bytes
move when somebody moves a ``Copying``. The ends are those of the real client and servicer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
import grpc.aio
from grpc.aio import EOF
from support.hand_loop import HandLoop

from baton.errors import TransferError
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.base import (
    Ended,
    Operation,
    PullLink,
    PullTransport,
    Quiescence,
    ServeLink,
    ServeTransport,
)

TRANSPORT = "shared_memory"
_OK = (grpc.StatusCode.OK, "")


class _Aborted(Exception):
    """As grpc ends a handler that aborts."""


class _Mailbox:
    def __init__(self, loop: HandLoop) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        while not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._items[0] if self._items[0] is EOF else self._items.popleft()


class Wire:
    """One stream of a decode process to a prefill process, which serves it with ``pull``."""

    def __init__(self, decode: Any, prefill: Any) -> None:
        self.decode, self.prefill = decode, prefill
        self.to_prefill: list[Any] = []
        self.to_decode: list[Any] = []
        self.end_status: tuple[grpc.StatusCode, str] | None = None
        self.greeted = False
        """Welcome has been delivered."""
        self.ended: asyncio.Future[tuple[grpc.StatusCode, str]] = decode.loop.create_future()
        self._decode_box, self._prefill_box = _Mailbox(decode.loop), _Mailbox(prefill.loop)
        self._handler = prefill.loop.start(self._serve())

    async def _serve(self) -> None:
        try:
            await self.prefill.pull(None, _Context(self))
            self.end(*_OK)
        except _Aborted:
            pass

    def deliver(self, pipe: list[Any], index: int) -> Any:
        message = pipe.pop(index)
        self.insert(pipe, message)
        return message

    def insert(self, pipe: list[Any], message: Any) -> None:
        """Delivers what does not lie on it."""
        (self._prefill_box if pipe is self.to_prefill else self._decode_box).put(message)

    def cut(self) -> None:
        """The network fails, or a process at one end."""
        self.end(grpc.StatusCode.UNAVAILABLE, "the stream was cut")

    def end(self, code: grpc.StatusCode, details: str) -> None:
        if self.end_status is None:
            self.end_status = (code, details)
            self.ended.set_result(self.end_status)
            self.to_prefill.clear()
            self.to_decode.clear()
            self._decode_box.put(EOF)
            self._prefill_box.put(EOF)

    def cancel(self) -> None:
        """By the client, which takes the handler along."""
        self.end(grpc.StatusCode.CANCELLED, "cancelled by the client")
        self.prefill.loop.call_soon(self._handler.cancel)


class MemoryCall:
    """The client's end. As much of grpc.aio.StreamStreamCall as is used."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def write(self, message: Any) -> None:
        if self._wire.end_status is not None:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(self._wire.end_status[0], nothing, nothing)
        self._wire.to_prefill.append(message)

    async def read(self) -> Any:
        return await self._wire._decode_box.get()

    async def code(self) -> grpc.StatusCode:
        return (await asyncio.shield(self._wire.ended))[0]

    async def details(self) -> str:
        return (await asyncio.shield(self._wire.ended))[1]

    def cancel(self) -> None:
        self._wire.cancel()


class _Context:
    """The server's end. As much of grpc.aio.ServicerContext as is used."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def read(self) -> Any:
        return await self._wire._prefill_box.get()

    async def write(self, message: Any) -> None:
        if self._wire.end_status is None:
            self._wire.to_decode.append(message)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._wire.end(code, details)
        raise _Aborted(details)


class MemoryServe(ServeTransport):
    name = TRANSPORT

    async def start(self) -> None: ...

    async def open(self, welcome: Any, lost: Any, rendezvous: Any) -> ServeLink:
        welcome.shared_memory.socket_path = "@nowhere"
        return _ServeLink()

    async def close(self) -> None: ...


class _ServeLink(ServeLink):
    name = TRANSPORT

    async def connect(self) -> None: ...

    def send(self, blocks: BlockRange, ended: Ended) -> None:
        raise AssertionError("a one-sided transport was asked to send")

    send_filler = send  # type: ignore[assignment]

    async def close(self) -> None: ...


class Copying:
    """One posted range. It ends when the test says so, stopped or not."""

    def __init__(self, link: MemoryLink, operation: Operation) -> None:
        self.link, self.operation = link, operation
        self.num_moved = 0

    @property
    def blocks(self) -> BlockRange:
        return self.operation.blocks

    def move(self, num_tokens: int) -> None:
        """Copies some tokens of what lies in the source now, late or not."""
        blocks, source, target = self.blocks, self.link.source, self.link.process.engine.slots
        end = min(blocks.num_tokens, self.num_moved + num_tokens)
        for token in range(self.num_moved, end):
            target.write(blocks.blocks, token, source.read(blocks.source_blocks, token))
        self.num_moved = end

    def end(self) -> None:
        self.link.copies.remove(self)
        whole = self.num_moved == self.blocks.num_tokens
        error = None if whole else TransferError("the copy was stopped")
        self.link.process.loop.call_soon(self.operation.ended, error)
        self.link.maybe_idle()


class MemoryLink(PullLink):
    name = TRANSPORT

    def __init__(self, process: Any, source: Any, *, knows: bool) -> None:
        self.process, self.source = process, source
        self.copies: list[Copying] = []
        self._knows = knows
        self._idle: asyncio.Future[None] | None = None

    def post(self, blocks: BlockRange, *, posted: Any, ended: Ended) -> Operation:
        operation = Operation(blocks, ended)
        self.copies.append(Copying(self, operation))
        return operation

    def quiesce(self, operation: Operation) -> Quiescence:
        return Quiescence.ENDING if self._knows else Quiescence.UNKNOWN

    def maybe_idle(self) -> None:
        if not self.copies and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def close(self) -> None:
        while self.copies:
            self._idle = self.process.loop.create_future()
            await self._idle


class MemoryPull(PullTransport):
    """Of ``process``; ``memories`` are all prefill processes' by their epochs, dead ones' too,
    since what is mapped stays. ``knows``: quiesce does not say "unknown"."""

    name = TRANSPORT

    def __init__(self, process: Any, memories: dict[bytes, Any], *, knows: bool) -> None:
        self._process, self._memories, self._knows = process, memories, knows
        self.links: list[MemoryLink] = []

    async def connect(self, welcome: Any, layout: Any, lost: Any, rendezvous: Any) -> PullLink:
        link = MemoryLink(self._process, self._memories[welcome.epoch], knows=self._knows)
        self.links.append(link)
        return link

    async def close(self) -> None:
        assert not any(link.copies for link in self.links)
