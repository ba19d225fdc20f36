"""The decode side's end of one ``Pull`` stream, from its greeting to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from baton.errors import IncompatiblePeerError, InternalError, TransferError
from baton.faults import Faults
from kv_transfer.keys import TransferKey
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

logger = logging.getLogger(__name__)

FAULT_POINTS = {
    "attach": "decode.attach",
    "release": "decode.release",
    "released": "decode.released",
}
"""Before a message of that kind leaves, or after it was read."""

_STATUS_S = 1.0
_FINAL = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""What a peer answers that will answer the same the next time."""

Call = Any  # grpc.aio.StreamStreamCall, which the stubs type by request and response


class RefusedError(Exception):
    """The peer can never serve this worker; carries what its transfers are told."""

    def __init__(self, error: TransferError) -> None:
        super().__init__(error.message)
        self.error = error


class PullStream:
    """Calls ``received`` for every message after the greeting, and ``held_back`` where
    a fault point refused to let a message through.

    Args:
        named: the peer, for errors and logs.
    """

    def __init__(
        self,
        call: Call,
        *,
        named: str,
        faults: Faults,
        received: Callable[[pb.PullResponse], None],
        held_back: Callable[[TransferKey, InternalError], None],
    ) -> None:
        self._call = call
        self._named = named
        self._faults = faults
        self._received = received
        self._held_back = held_back
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[tuple[TransferKey | None, pb.PullRequest]] = asyncio.Queue()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self.rendezvous = Rendezvous(self._send_rendezvous)

    async def greet(self, hello: pb.PeerHello) -> pb.PeerWelcome:
        """Then messages flow. Raises TransferError or RefusedError."""
        try:
            await self._call.write(pb.PullRequest(hello=hello))
            response = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await self.status() from None
        if response is grpc.aio.EOF or not response.HasField("welcome"):
            raise await self.status()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        welcome: pb.PeerWelcome = response.welcome
        return welcome

    def send(self, key: TransferKey, request: pb.PullRequest) -> None:
        """Never waits; messages leave in this order."""
        self._outbox.put_nowait((key, request))

    def lose(self, reason: str) -> None:
        """Ends the stream; without a reason, in order."""
        if not self._lost.done():
            self._lost.set_result(reason)

    @property
    def over(self) -> bool:
        return self._lost.done() or any(task.done() for task in self._tasks)

    async def wait_end(self) -> None:
        """Returns when the stream was ended in order; raises what else ended it."""
        ends: list[asyncio.Future[Any]] = [*self._tasks, self._lost]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._lost.done():
            raise await self.status()
        if reason := self._lost.result():
            raise TransferError(f"{self._named}: {reason}")

    async def close(self) -> None:
        self.rendezvous.close()
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        for error in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(error, Exception) and not isinstance(error, grpc.aio.AioRpcError):
                logger.error("the stream to %s failed", self._named, exc_info=error)

    async def status(self) -> TransferError | RefusedError:
        """What a stream that ended says about its end."""
        try:
            async with asyncio.timeout(_STATUS_S):
                code, details = await self._call.code(), await self._call.details()
        except TimeoutError:
            return TransferError(f"the stream to {self._named} failed")
        if code in _FINAL:
            return RefusedError(IncompatiblePeerError(f"{self._named} refuses: {details}"))
        return TransferError(f"{self._named} is lost: {details or code.name}")

    async def _read(self) -> None:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                kind = response.WhichOneof("body")
                if kind == "rendezvous":
                    self.rendezvous.received(response.rendezvous.key, response.rendezvous.value)
                    continue
                released = kind == "released"
                key = TransferKey.from_proto(response.released.key) if released else None
                if await self._passes(kind, key):
                    self._received(response)
        finally:
            self.rendezvous.close()

    async def _write(self) -> None:
        while True:
            key, request = await self._outbox.get()
            if await self._passes(request.WhichOneof("body"), key):
                await self._call.write(request)

    async def _passes(self, kind: str | None, key: TransferKey | None) -> bool:
        """False where a fault point holds a message of that kind back."""
        try:
            if point := FAULT_POINTS.get(kind or ""):
                await self._faults.wait(point)
        except InternalError as error:
            assert key is not None
            self._held_back(key, error)
            return False
        return True

    def _send_rendezvous(self, key: str, value: bytes) -> None:
        """In the thread that builds the link."""
        request = pb.PullRequest(rendezvous=pb.Rendezvous(key=key, value=value))
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, (None, request))
