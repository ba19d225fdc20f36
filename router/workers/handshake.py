"""The beginning of a Session: who we are, and whether the worker is who we think."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import grpc.aio

from baton.config import SessionConfig
from baton.errors import IncompatiblePeerError, WorkerLostError
from baton.protocol import PROTOCOL_VERSION
from baton.records import WorkerRecord
from baton.rpc import auth_metadata
from baton.v1 import session_pb2 as pb
from baton.v1 import session_pb2_grpc

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.GatewayMessage, pb.WorkerMessage]"

STREAM_ENDED = (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError)
"""What grpc.aio raises when a stream has ended; CancelledError where the peer cancelled it."""


def being_cancelled() -> bool:
    """It is this task that is cancelled, not a stream that it used."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def reason_of(error: BaseException) -> str:
    """In words, how gRPC ended a stream."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, asyncio.CancelledError):
        return "the stream was cancelled"
    return "the connection broke"


@dataclass(frozen=True, slots=True)
class GatewayIdentity:
    """What this gateway says of itself and asks of a worker."""

    gateway_id: str
    generation: str
    model: str
    secret: str

    def hello(self) -> pb.Hello:
        return pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            generation=self.generation,
            gateway_id=self.gateway_id,
        )


def _refusal(record: WorkerRecord, identity: GatewayIdentity, welcome: pb.Welcome) -> str | None:
    """Why the process that answered is not to be worked with; None where it is."""
    facts = (
        ("protocol version", PROTOCOL_VERSION, welcome.protocol_version),
        ("generation", identity.generation, welcome.generation),
        ("model", identity.model, welcome.model),
        ("worker id", record.worker_id, welcome.worker_id),
        ("role", record.role, welcome.role),
        ("epoch", record.epoch, welcome.epoch.hex()),
        ("digest", record.digest, welcome.digest.hex()),
    )
    for name, expected, got in facts:
        if expected != got:
            return f"its {name} is {got!r}, expected {expected!r}"
    return None


async def _exchange(call: Call, identity: GatewayIdentity, config: SessionConfig) -> pb.Welcome:
    try:
        async with asyncio.timeout(config.silence_s):
            await call.write(pb.GatewayMessage(hello=identity.hello()))
            first = await call.read()
    except TimeoutError:
        raise WorkerLostError(f"no answer within {config.silence_s:g} s") from None
    except STREAM_ENDED as error:
        if being_cancelled():
            raise
        raise WorkerLostError(reason_of(error)) from None
    if not isinstance(first, pb.WorkerMessage) or first.WhichOneof("body") != "welcome":
        raise IncompatiblePeerError("its first message is no Welcome")
    return first.welcome


async def greet(
    record: WorkerRecord,
    channel: grpc.aio.Channel,
    *,
    identity: GatewayIdentity,
    config: SessionConfig,
) -> tuple[Call, pb.Welcome]:
    """Opens a Session and shakes hands, within ``silence_s``; the caller cancels the call.

    Raises: WorkerLostError when nobody answers; IncompatiblePeerError when it is
    not the process of ``record``, or serves something else.
    """
    stub = session_pb2_grpc.WorkerStub(channel)
    call: Call = stub.Session(metadata=auth_metadata(identity.secret))
    try:
        welcome = await _exchange(call, identity, config)
        if (reason := _refusal(record, identity, welcome)) is not None:
            raise IncompatiblePeerError(reason)
    except BaseException:
        call.cancel()
        raise
    return call, welcome
