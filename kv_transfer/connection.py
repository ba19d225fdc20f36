"""The prefill side's end of one decode worker's stream: what is written to it, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from baton.errors import InternalError
from baton.faults import Faults
from kv_transfer.keys import TransferKey
from kv_transfer.transports.base import ServeLink
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

FAULT_POINTS = {
    "ready": "prefill.offer",
    "commit": "prefill.commit",
    "released": "prefill.released",
}


class DecodeConnection:
    """One stream. It ends when the peer goes, or when ``lose`` is called."""

    def __init__(self, hello: pb.PeerHello, faults: Faults) -> None:
        self.worker_id = hello.worker_id
        self.epoch = hello.epoch
        self.link: ServeLink | None = None
        self.keys: set[TransferKey] = set()
        """Transfers that attached on this stream and have not ended."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.rendezvous = Rendezvous(self._send_rendezvous)
        self._loop = asyncio.get_running_loop()
        self._faults = faults
        self._outbox: asyncio.Queue[tuple[TransferKey | None, pb.PullResponse]] = asyncio.Queue()

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    def send(self, key: TransferKey, response: pb.PullResponse) -> None:
        """Never waits; messages leave in this order."""
        self._outbox.put_nowait((key, response))

    async def write(
        self,
        write: Callable[[pb.PullResponse], Awaitable[None]],
        failed: Callable[[TransferKey, InternalError], None],
    ) -> None:
        """Writes what ``send`` was given, until cancelled. ``failed`` hears of messages
        that a fault point held back."""
        while True:
            key, response = await self._outbox.get()
            try:
                if point := FAULT_POINTS.get(response.WhichOneof("body") or ""):
                    await self._faults.wait(point)
            except InternalError as error:
                assert key is not None
                failed(key, error)
                continue
            await write(response)

    def _send_rendezvous(self, key: str, value: bytes) -> None:
        """In the thread that builds the link."""
        response = pb.PullResponse(rendezvous=pb.Rendezvous(key=key, value=value))
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, (None, response))
