"""The gateway's end of the Session, against a real gRPC port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from baton import rpc
from baton.config import SessionConfig
from baton.errors import BatonError, IncompatiblePeerError, WorkerLostError
from baton.logprobs import TokenLogprobs
from baton.protocol import PROTOCOL_VERSION
from baton.v1 import session_pb2 as pb
from router.routing.kv_index import KvIndex
from router.workers.handshake import GatewayIdentity, greet
from router.workers.session import WorkerSession
from tests.support.fake_cluster import IDENTITY, wait_until
from tests.support.fake_worker import SESSION, FakeWorker

SHORT = SessionConfig(report_s=0.05, silence_s=0.3)


class Sink:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.times: list[float] = []

    def on_reserved(self, num_held_tokens: int) -> None:
        self.heard.append(("reserved", num_held_tokens))

    def on_token(
        self, position: int, token_id: int, at: float, logprobs: TokenLogprobs | None
    ) -> None:
        self.heard.append((position, token_id) + (() if logprobs is None else (logprobs,)))
        self.times.append(at)

    def on_closed(self, closed: pb.Closed) -> None:
        self.heard.append(closed.reason)

    def on_lost(self, error: WorkerLostError) -> None:
        self.heard.append(error)


@asynccontextmanager
async def started(worker: FakeWorker) -> AsyncIterator[FakeWorker]:
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


@asynccontextmanager
async def connected(
    worker: FakeWorker,
    *,
    identity: GatewayIdentity = IDENTITY,
    config: SessionConfig = SESSION,
    index: KvIndex | None = None,
    **record: Any,
) -> AsyncIterator[tuple[WorkerSession, asyncio.Task[str]]]:
    """A live Session; ``record`` changes what the registry says of the worker."""
    channel = rpc.channel(worker.record.address, config)
    listed = worker.record.model_copy(update=record)
    try:
        call, welcome = await greet(listed, channel, identity=identity, config=config)
        session = WorkerSession(
            listed,
            call,
            config,
            kv_dtype=welcome.kv_dtype,
            index=index or KvIndex(asyncio.get_running_loop().time),
        )
        running = asyncio.create_task(session.run())
        try:
            yield session, running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        await channel.close()


async def test_hello_says_who_the_gateway_is() -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker, connected(worker):
        hello = worker.received[0].hello
        assert (hello.protocol_version, hello.generation) == (PROTOCOL_VERSION, "0")
        assert hello.gateway_id == "gateway-0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol_version": 99}, "protocol version"),
        ({"generation": "1"}, "generation"),
        ({"model": "another"}, "model"),
        ({"worker_id": "decode-9"}, "worker id"),
        ({"role": "prefill"}, "role"),
        ({"epoch": b"\x09" * 16}, "epoch"),
        ({"digest": b"\x09" * 16}, "digest"),
    ],
)
async def test_worker_that_is_not_the_one_listed_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker:
        worker.welcome_changes = changes
        with pytest.raises(IncompatiblePeerError, match=named):
            async with connected(worker):
                pass


async def test_first_message_that_is_no_welcome_is_refused() -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker:
        worker.first_message = pb.WorkerMessage(report=pb.Report())
        with pytest.raises(IncompatiblePeerError, match="no Welcome"):
            async with connected(worker):
                pass


async def test_wrong_secret_opens_nothing() -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker:
        stranger = replace(IDENTITY, secret="guessed")
        with pytest.raises(WorkerLostError, match="UNAUTHENTICATED"):
            async with connected(worker, identity=stranger):
                pass
        assert worker.received == []


async def test_worker_that_never_welcomes_is_given_up() -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker:
        worker.first_message = None
        with pytest.raises(WorkerLostError, match="no answer"):
            async with connected(worker, config=SHORT):
                pass


async def test_port_without_a_worker_is_a_lost_worker() -> None:
    async with started(FakeWorker("decode-0", "decode")) as worker:
        await worker.stop()
        with pytest.raises(WorkerLostError):
            async with connected(worker):
                pass


async def test_events_reach_the_stream_they_belong_to_in_field_order() -> None:
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker) as (session, _),
    ):
        sinks = {stream_id: Sink() for stream_id in (1, 2)}
        for stream_id, sink in sinks.items():
            session.open(pb.Open(stream_id=stream_id), sink)
        told = TokenLogprobs(-0.5, ((11, -0.5), (3, -2.0)))
        worker.send_events(
            pb.Events(
                closed=[pb.Closed(stream_id=2, reason=pb.CLOSE_REASON_STOP)],
                tokens=pb.TokenBatch(
                    stream_ids=[1, 2, 1, 7],
                    positions=[0, 4, 1, 0],
                    token_ids=[10, 20, 11, 99],
                    logprobs=[told.to_proto(2), TokenLogprobs(-7.0).to_proto(3)],
                ),
                reserved=[pb.Reserved(stream_id=1, num_held_tokens=16)],
            )
        )
        await wait_until(lambda: len(sinks[2].heard) == 2)
        assert sinks[1].heard == [("reserved", 16), (0, 10), (1, 11, told)]
        assert sinks[2].heard == [(4, 20), pb.CLOSE_REASON_STOP]
        assert len({*sinks[1].times, *sinks[2].times}) == 1
        assert session.num_open == 1


async def test_messages_leave_in_the_order_in_which_they_were_given() -> None:
    async with (
        started(FakeWorker("prefill-0", "prefill")) as worker,
        connected(worker) as (session, _),
    ):
        for stream_id in range(1, 20):
            session.open(pb.Open(stream_id=stream_id), Sink())
            session.proceed(stream_id, stream_id)
            session.cancel(stream_id)
            session.proceed(stream_id, 0)
            session.cancel(stream_id)
        await wait_until(lambda: len(worker.received) >= 1 + 3 * 19)
        bodies = [message.WhichOneof("body") for message in worker.received]
        assert bodies == ["hello", *["open", "proceed", "cancel"] * 19]


async def test_cancelled_stream_hears_nothing_more() -> None:
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker) as (session, _),
    ):
        cancelled, other = Sink(), Sink()
        session.open(pb.Open(stream_id=1), cancelled)
        session.open(pb.Open(stream_id=2), other)
        session.cancel(1)
        for stream_id in (1, 2):
            batch = pb.TokenBatch(stream_ids=[stream_id], positions=[0], token_ids=[5])
            closed = pb.Closed(stream_id=stream_id, reason=pb.CLOSE_REASON_CANCELLED)
            worker.send_events(pb.Events(tokens=batch, closed=[closed]))
        await wait_until(lambda: len(other.heard) == 2)
        assert cancelled.heard == []
        assert session.num_open == 0


@pytest.mark.parametrize("how", ["worker dies", "session ends", "worker is silent"])
async def test_loss_tells_every_open_stream_at_once_and_takes_no_more(how: str) -> None:
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker, config=SHORT) as (session, running),
    ):
        sinks = [Sink(), Sink()]
        for stream_id, sink in enumerate(sinks, start=1):
            session.open(pb.Open(stream_id=stream_id), sink)
        await worker.next_open()
        if how == "worker dies":
            await worker.stop()
        elif how == "session ends":
            worker.end_session()
        else:
            worker.reporting = False
        reason = await running
        assert ("silent" in reason) == (how == "worker is silent")
        for sink in sinks:
            (error,) = sink.heard
            assert isinstance(error, WorkerLostError)
            assert "decode-0" in error.message
        assert session.num_open == 0
        with pytest.raises(BatonError):
            session.open(pb.Open(stream_id=3), Sink())


async def test_load_counts_what_was_opened_since_the_last_report() -> None:
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker) as (session, _),
    ):
        for stream_id in (1, 2):
            session.open(pb.Open(stream_id=stream_id), Sink())
        assert session.num_sequences == 2
        worker.report = pb.Report(num_running=5, num_waiting=2, metrics=b"page")
        await wait_until(lambda: session.report is not None and session.report.num_running == 5)
        assert session.num_sequences == 7
        session.open(pb.Open(stream_id=3), Sink())
        assert session.num_sequences == 8
        session.cancel(1)
        session.cancel(2)
        assert session.num_sequences == 6


async def test_report_says_how_old_its_counts_are_and_which_opens_they_include() -> None:
    async with (
        started(FakeWorker("prefill-0", "prefill")) as worker,
        connected(worker) as (session, _),
    ):
        for stream_id in (1, 2):
            session.given.decided(100)
            prompt = [1] * (7 * session.record.block_size - 3)
            session.open(pb.Open(stream_id=stream_id, prompt_token_ids=prompt), Sink())
        worker.reporting = False
        worker.send(pb.WorkerMessage(report=pb.Report(num_opens=1, load_age_ms=700)))
        await wait_until(lambda: session.report is not None and session.report.num_opens == 1)
        assert session.reported_at is not None
        assert session.load_at == pytest.approx(session.reported_at - 0.7)
        assert (session.given.num_tokens, session.given.num_blocks) == (100, 7)


async def test_cache_events_feed_the_index_until_the_worker_is_lost() -> None:
    index = KvIndex(asyncio.get_running_loop().time)
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker, index=index) as (_, running),
    ):

        def send(sequence: int, added: bytes, *, snapshot: bool = False) -> None:
            events = pb.CacheEvents(sequence=sequence, added=added, snapshot=snapshot)
            worker.send(pb.WorkerMessage(cache_events=events))

        def num_indexed() -> int:
            return index.num_indexed_blocks(worker.epoch)

        send(1, b"a" * 16, snapshot=True)
        send(2, b"b" * 16 + b"c" * 16)
        await wait_until(lambda: num_indexed() == 3)
        send(4, b"e" * 16)
        await wait_until(lambda: worker.num_received("cache_snapshot_request") == 1)
        assert num_indexed() == 0
        send(5, b"a" * 16 + b"e" * 16, snapshot=True)
        await wait_until(lambda: num_indexed() == 2)
        await worker.stop()
        await running
        assert num_indexed() == 0


async def test_garbage_from_a_worker_loses_its_session_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        started(FakeWorker("decode-0", "decode")) as worker,
        connected(worker) as (session, running),
    ):
        sink = Sink()
        session.open(pb.Open(stream_id=1), sink)
        worker.send_events(pb.Events(tokens=pb.TokenBatch(stream_ids=[1], positions=[0])))
        await running
        assert isinstance(sink.heard[0], WorkerLostError)
        assert "Session with decode-0 failed" in caplog.text
