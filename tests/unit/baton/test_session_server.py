"""A worker's end of the Session, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from baton.config import SessionConfig
from baton.logprobs import TokenLogprobs
from baton.protocol import PROTOCOL_VERSION
from baton.rpc import auth_metadata, channel, server
from baton.v1 import session_pb2 as pb
from baton.v1 import session_pb2_grpc
from baton.worker.session_server import SessionServer, StepEvents, StreamKey

CONFIG = SessionConfig(report_s=60.0, silence_s=120.0)
SECRET = "secret of this test"


class Handler:
    """Keeps what a gateway asked for."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.lost = asyncio.Event()

    def on_open(self, key: StreamKey, message: pb.Open) -> None:
        self.seen.append(("open", key, list(message.prompt_token_ids)))

    def on_proceed(self, key: StreamKey, num_held_tokens: int) -> None:
        self.seen.append(("proceed", key, num_held_tokens))

    def on_cancel(self, key: StreamKey) -> None:
        self.seen.append(("cancel", key))

    def on_session_lost(self, session: int) -> None:
        self.seen.append(("lost", session))
        self.lost.set()


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[str, SessionServer, Handler]]:
    handler = Handler()
    sessions = SessionServer(
        welcome=pb.Welcome(worker_id="w", generation="g", protocol_version=PROTOCOL_VERSION),
        handler=handler,
        report=lambda session: pb.Report(num_steps=3, num_opens=session),
        config=CONFIG,
    )
    running = server(SECRET, CONFIG)
    session_pb2_grpc.add_WorkerServicer_to_server(sessions, running)
    port = running.add_insecure_port("127.0.0.1:0")
    await running.start()
    try:
        yield f"127.0.0.1:{port}", sessions, handler
    finally:
        await running.stop(None)


def hello(**changes: Any) -> pb.GatewayMessage:
    facts: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "generation": "g",
        "gateway_id": "gw",
    }
    return pb.GatewayMessage(hello=pb.Hello(**(facts | changes)))


async def greeted(address: str, secret: str = SECRET) -> Any:
    """An open Session after Hello; the caller reads Welcome."""
    link = channel(address, CONFIG)
    call = session_pb2_grpc.WorkerStub(link).Session(metadata=auth_metadata(secret))
    await call.write(hello())
    return link, call


async def test_messages_reach_the_handler_and_events_come_back_in_one_message() -> None:
    async with serving() as (address, sessions, handler):
        link, call = await greeted(address)
        assert (await call.read()).welcome.worker_id == "w"
        assert (await call.read()).cache_events == pb.CacheEvents(sequence=1, snapshot=True)
        assert (await call.read()).report == pb.Report(num_steps=3, num_opens=1)
        await call.write(pb.GatewayMessage(open=pb.Open(stream_id=4, prompt_token_ids=[1, 2])))
        await call.write(pb.GatewayMessage(proceed=pb.Proceed(stream_id=4, num_held_tokens=16)))
        await call.write(pb.GatewayMessage(cancel=pb.Cancel(stream_id=4)))
        while len(handler.seen) < 3:
            await asyncio.sleep(0.01)
        key = handler.seen[0][1]
        assert handler.seen == [("open", key, [1, 2]), ("proceed", key, 16), ("cancel", key)]
        other = StreamKey(key.session + 1, 4)
        sessions.deliver(
            StepEvents(
                reserved=[(key, 32)],
                tokens=[(key, 0, 11), (other, 0, 12), (key, 1, 13)],
                logprobs={1: TokenLogprobs(-9.0), 2: TokenLogprobs(-0.5, ((13, -0.5), (4, -2.0)))},
                closed=[(key, pb.Closed(reason=pb.CLOSE_REASON_STOP))],
            )
        )
        events = (await call.read()).events
        assert [(r.stream_id, r.num_held_tokens) for r in events.reserved] == [(4, 32)]
        assert list(events.tokens.token_ids) == [11, 13]
        assert list(events.tokens.positions) == [0, 1]
        [logprobs] = events.tokens.logprobs
        assert (logprobs.index, logprobs.logprob) == (1, -0.5)
        assert list(logprobs.top_token_ids) == [13, 4]
        assert list(logprobs.top_logprobs) == [-0.5, -2.0]
        assert [(c.stream_id, c.reason) for c in events.closed] == [(4, pb.CLOSE_REASON_STOP)]
        call.cancel()
        await link.close()


async def next_cache_events(call: Any) -> pb.CacheEvents:
    while True:
        message = await call.read()
        if message.WhichOneof("body") == "cache_events":
            events: pb.CacheEvents = message.cache_events
            return events


async def test_every_session_has_its_own_numbered_events_of_the_cache() -> None:
    one, other = b"1" * 16, b"2" * 16
    async with serving() as (address, sessions, _):
        sessions.deliver(StepEvents(cache={one: True}))
        first_link, first = await greeted(address)
        assert await next_cache_events(first) == pb.CacheEvents(
            sequence=1, snapshot=True, added=one
        )
        sessions.deliver(StepEvents(cache={one: False, other: True}))
        changed = pb.CacheEvents(sequence=2, removed=one, added=other)
        assert await next_cache_events(first) == changed
        second_link, second = await greeted(address)
        snapshot = pb.CacheEvents(sequence=1, snapshot=True, added=other)
        assert await next_cache_events(second) == snapshot
        request = pb.CacheSnapshotRequest()
        await first.write(pb.GatewayMessage(cache_snapshot_request=request))
        again = pb.CacheEvents(sequence=3, snapshot=True, added=other)
        assert await next_cache_events(first) == again
        for call, link in ((first, first_link), (second, second_link)):
            call.cancel()
            await link.close()


async def test_gateway_that_goes_is_reported_once() -> None:
    async with serving() as (address, _, handler):
        link, call = await greeted(address)
        await call.read()
        call.cancel()
        await link.close()
        await asyncio.wait_for(handler.lost.wait(), 5)
        assert [kind for kind, *_ in handler.seen] == ["lost"]


@pytest.mark.parametrize("changes", [{"generation": "h"}, {"protocol_version": 99}])
async def test_other_generation_or_protocol_is_refused(changes: dict[str, Any]) -> None:
    async with serving() as (address, _, handler):
        link = channel(address, CONFIG)
        call = session_pb2_grpc.WorkerStub(link).Session(metadata=auth_metadata(SECRET))
        await call.write(hello(**changes))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert handler.seen == []
        await link.close()


@pytest.mark.parametrize("secret", ["", "wrong", SECRET + " "])
async def test_wrong_secret_opens_nothing(secret: str) -> None:
    async with serving() as (address, _, handler):
        link = channel(address, CONFIG)
        call = session_pb2_grpc.WorkerStub(link).Session(metadata=auth_metadata(secret))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.write(hello())
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert handler.seen == []
        await link.close()


async def test_session_without_hello_is_refused() -> None:
    async with serving() as (address, _, handler):
        link = channel(address, CONFIG)
        call = session_pb2_grpc.WorkerStub(link).Session(metadata=auth_metadata(SECRET))
        await call.write(pb.GatewayMessage(cancel=pb.Cancel(stream_id=1)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert handler.seen == []
        await link.close()
