"""Does a KV index that has followed a whole run hold what the workers hold?

A ``Follower`` opens Sessions of its own with every worker, as a gateway does, and feeds
the product's ``KvIndex`` with the events that come. One that was there from the beginning
has a snapshot of empty caches and every change since; one that joins at rest has a
snapshot of what the workers hold then. Hash for hash they have to agree, and so have the
numbers that the serving gateway shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc.aio

from baton import rpc
from baton.config import SessionConfig
from baton.protocol import PROTOCOL_VERSION
from baton.v1 import session_pb2 as pb
from baton.v1 import session_pb2_grpc
from router.routing.kv_index import KvIndex

_PATIENCE_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class WorkerBlocks:
    """What one worker's cache holds, by everybody's account."""

    followed: frozenset[bytes]
    """By every change since it was empty."""
    snapshot: frozenset[bytes]
    """By its own word now."""
    num_cached: int
    """By the engine's count of blocks that are published and that nobody uses."""
    num_indexed: int
    """By the serving gateway's index."""

    @property
    def agree(self) -> bool:
        same = self.followed == self.snapshot
        return same and len(self.snapshot) == self.num_cached == self.num_indexed


class Follower:
    """Sessions with the workers of a ``GET /status``; ``secret`` is BATON_SECRET."""

    def __init__(self, workers: Sequence[Mapping[str, Any]], *, secret: str, name: str) -> None:
        self._workers = workers
        self._secret = secret
        self._name = name
        self._index = KvIndex(asyncio.get_running_loop().time)
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Returns once every worker has sent its snapshot."""
        greeted = [asyncio.Event() for _ in self._workers]
        for worker, event in zip(self._workers, greeted, strict=True):
            self._tasks.append(asyncio.create_task(self._follow(worker, event)))
        async with asyncio.timeout(_PATIENCE_S):
            for event in greeted:
                await event.wait()
        return self

    async def __aexit__(self, *raised: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def blocks(self) -> dict[str, frozenset[bytes]]:
        """By worker id. Raises what ended a Session."""
        for task in self._tasks:
            if task.done():
                task.result()
        return {
            worker["worker_id"]: self._index.indexed_blocks(bytes.fromhex(worker["epoch"]))
            for worker in self._workers
        }

    async def _follow(self, worker: Mapping[str, Any], greeted: asyncio.Event) -> None:
        epoch = bytes.fromhex(worker["epoch"])
        channel = rpc.channel(worker["address"], SessionConfig())
        self._channels.append(channel)
        call = session_pb2_grpc.WorkerStub(channel).Session(
            metadata=rpc.auth_metadata(self._secret)
        )
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            generation=worker["generation"],
            gateway_id=self._name,
        )
        await call.write(pb.GatewayMessage(hello=hello))
        self._index.join(epoch, num_blocks=worker["num_blocks"])
        while isinstance(message := await call.read(), pb.WorkerMessage):
            if message.WhichOneof("body") == "cache_events":
                lost_track = self._index.take(epoch, message.cache_events)
                assert not lost_track, f"an event of {worker['worker_id']} is missing"
                greeted.set()
        raise ConnectionError(f"{worker['worker_id']} ended the Session")


async def at_rest(
    follower: Follower, status: Mapping[str, Any], *, secret: str
) -> dict[str, WorkerBlocks]:
    """Asks every worker anew; ``status`` is that of the serving gateway, at rest."""
    workers = status["workers"]
    async with Follower(workers, secret=secret, name="truth") as fresh:

        def compared() -> dict[str, WorkerBlocks]:
            followed, snapshot = follower.blocks(), fresh.blocks()
            return {
                worker["worker_id"]: WorkerBlocks(
                    followed=followed[worker["worker_id"]],
                    snapshot=snapshot[worker["worker_id"]],
                    num_cached=worker["num_cached_blocks"],
                    num_indexed=worker["num_indexed_blocks"],
                )
                for worker in workers
            }

        # The last change may still be on its way to one of the two.
        for _ in range(round(_PATIENCE_S / _POLL_S)):
            if all(blocks.agree for blocks in compared().values()):
                break
            await asyncio.sleep(_POLL_S)
        return compared()
