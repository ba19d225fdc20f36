"""A worker without an engine: the Session over a real gRPC port, its events scripted.

A test either takes each stream in its own hands (``next_open``) or gives the
worker a script, which then runs once for every stream.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal

from baton import rpc
from baton.config import SessionConfig
from baton.errors import BatonError
from baton.logprobs import TokenLogprobs
from baton.protocol import PROTOCOL_VERSION, new_epoch
from baton.records import Role, WorkerRecord
from baton.v1 import session_pb2 as pb
from baton.v1 import session_pb2_grpc

SECRET = "a-secret-of-the-tests"
MODEL = "a-model"
DIGEST = b"\x01" * 16
KV_DTYPE = "float32"
SESSION = SessionConfig(report_s=0.05, silence_s=5.0)

Script = Callable[["FakeStream"], Awaitable[None]]


def worker_record(
    worker_id: str,
    role: Role,
    epoch: bytes,
    address: str = "127.0.0.1:1",
    digest: bytes = DIGEST,
    max_model_len: int = 2048,
) -> WorkerRecord:
    """What such a worker would register."""
    return WorkerRecord(
        worker_id=worker_id,
        role=role,
        epoch=epoch.hex(),
        protocol_version=PROTOCOL_VERSION,
        generation="0",
        address=address,
        metrics_address="127.0.0.1:1",
        model=MODEL,
        digest=digest.hex(),
        block_size=16,
        num_blocks=100,
        max_model_len=max_model_len,
        pid=os.getpid(),
        host="localhost",
        started_at=time.time(),
    )


class FakeStream:
    """One stream that a gateway opened, in the worker's hands."""

    def __init__(self, worker: FakeWorker, message: pb.Open) -> None:
        self.worker = worker
        self.message = message
        self.held: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """``num_held_tokens`` of Proceed."""
        self.num_cancels = 0
        self.cancelled = asyncio.Event()

    @property
    def first_position(self) -> int:
        return len(self.message.emitted_token_ids)

    def reserve(self, num_held_tokens: int = 0) -> None:
        reserved = pb.Reserved(stream_id=self.message.stream_id, num_held_tokens=num_held_tokens)
        self.worker.send_events(pb.Events(reserved=[reserved]))

    def tokens(
        self, position: int, *token_ids: int, logprobs: Mapping[int, TokenLogprobs] | None = None
    ) -> None:
        """Tokens at ``position`` and after it, in one batch; ``logprobs`` by position."""
        batch = self.batch(position, token_ids)
        for at, each in (logprobs or {}).items():
            batch.logprobs.append(each.to_proto(at - position))
        self.worker.send_events(pb.Events(tokens=batch))

    def batch(self, position: int, token_ids: tuple[int, ...]) -> pb.TokenBatch:
        return pb.TokenBatch(
            stream_ids=[self.message.stream_id] * len(token_ids),
            positions=range(position, position + len(token_ids)),
            token_ids=token_ids,
        )

    def close(self, reason: pb.CloseReason.ValueType, **account: int) -> None:
        """``account``: num_computed_tokens and the like."""
        self._close(pb.Closed(reason=reason, **account))  # type: ignore[arg-type]

    def fail(self, error: BatonError) -> None:
        self._close(
            pb.Closed(
                reason=pb.CLOSE_REASON_FAILED,
                error_code=error.code,
                error_message=error.message,
            )
        )

    def _close(self, closed: pb.Closed) -> None:
        closed.stream_id = self.message.stream_id
        self.worker.send_events(pb.Events(closed=[closed]))


class FakeWorker(session_pb2_grpc.WorkerServicer):
    """``start`` before use and ``stop`` after it; one Session at a time is enough for tests."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        *,
        script: Script | None = None,
        secret: str = SECRET,
        digest: bytes = DIGEST,
        max_model_len: int = 2048,
        session: SessionConfig = SESSION,
    ) -> None:
        self.worker_id = worker_id
        self.role: Role = role
        self.epoch = new_epoch()
        self.digest = digest
        self.max_model_len = max_model_len
        self.streams: dict[int, FakeStream] = {}
        """All that were ever opened."""
        self.received: list[pb.GatewayMessage] = []
        self.num_sessions = 0
        self.welcome_changes: dict[str, Any] = {}
        """Fields of Welcome that shall be wrong."""
        self.first_message: pb.WorkerMessage | Literal["welcome"] | None = "welcome"
        self.reporting = True
        self._num_opens = 0
        self.report = pb.Report()
        self._script = script
        self._session_config = session
        self._server = rpc.server(secret, session)
        self._port = 0
        self._outbox: asyncio.Queue[pb.WorkerMessage | None] | None = None
        self._opened: asyncio.Queue[FakeStream] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        session_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        """Dies: its port closes and its Session breaks."""
        for task in self._tasks:
            task.cancel()
        await self._server.stop(grace=None)

    @property
    def record(self) -> WorkerRecord:
        address = f"127.0.0.1:{self._port}"
        return worker_record(
            self.worker_id, self.role, self.epoch, address, self.digest, self.max_model_len
        )

    def _welcome(self) -> pb.Welcome:
        facts: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "generation": "0",
            "worker_id": self.worker_id,
            "role": self.role,
            "epoch": self.epoch,
            "model": MODEL,
            "digest": self.digest,
            "block_size": 16,
            "num_blocks": 100,
            "max_model_len": self.max_model_len,
            "kv_dtype": KV_DTYPE,
        }
        return pb.Welcome(**facts | self.welcome_changes)

    # ------------------------------------------------------ what a test does

    async def next_open(self) -> FakeStream:
        """The next stream that a gateway opens here, for workers without a script."""
        async with asyncio.timeout(5):
            return await self._opened.get()

    def send_events(self, events: pb.Events) -> None:
        """To the gateway, in order; nowhere where there is no Session."""
        self.send(pb.WorkerMessage(events=events))

    def send(self, message: pb.WorkerMessage) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    def end_session(self) -> None:
        """Ends the Session; the process lives on and takes another."""
        assert self._outbox is not None
        self._outbox.put_nowait(None)

    def num_received(self, body: str) -> int:
        """Messages of that kind, over all Sessions."""
        return sum(message.WhichOneof("body") == body for message in self.received)

    # ------------------------------------------------------------- the service

    async def Session(
        self, request_iterator: AsyncIterator[pb.GatewayMessage], context: Any
    ) -> AsyncIterator[pb.WorkerMessage]:
        self.received.append(await anext(aiter(request_iterator)))
        self.num_sessions += 1
        self._num_opens = 0
        outbox = self._outbox = asyncio.Queue()
        first = self.first_message
        if first is not None:
            welcome = pb.WorkerMessage(welcome=self._welcome())
            outbox.put_nowait(welcome if first == "welcome" else first)
        tasks = [
            asyncio.create_task(self._read(request_iterator)),
            *([asyncio.create_task(self._report_regularly())] if first is not None else []),
        ]
        try:
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, requests: AsyncIterator[pb.GatewayMessage]) -> None:
        async for message in requests:
            self.received.append(message)
            body = message.WhichOneof("body")
            if body == "open":
                self._num_opens += 1
                self._take(FakeStream(self, message.open))
            elif body == "proceed":
                self.streams[message.proceed.stream_id].held.set_result(
                    message.proceed.num_held_tokens
                )
            elif body == "cancel":
                stream = self.streams[message.cancel.stream_id]
                stream.num_cancels += 1
                stream.cancelled.set()

    def _take(self, stream: FakeStream) -> None:
        assert stream.message.stream_id not in self.streams, "a stream id came twice"
        self.streams[stream.message.stream_id] = stream
        if self._script is None:
            self._opened.put_nowait(stream)
            return
        task = asyncio.ensure_future(self._script(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report_regularly(self) -> None:
        while True:
            if self.reporting:
                report = pb.Report(num_opens=self._num_opens)
                report.MergeFrom(self.report)
                self.send(pb.WorkerMessage(report=report))
            await asyncio.sleep(self._session_config.report_s)


def expected_token(prompt: tuple[int, ...], position: int) -> int:
    """What every scripted worker answers to a prompt, whoever computes it."""
    return (sum(prompt) * 31 + position * 7 + 3) % 1000 + 10


class Scripts:
    """A prefill and a decode script that hand over to each other and always finish."""

    def __init__(self) -> None:
        self._commits: dict[bytes, asyncio.Future[int]] = {}

    def _commit(self, transfer_id: bytes) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        return self._commits.setdefault(transfer_id, loop.create_future())

    async def prefill(self, stream: FakeStream) -> None:
        await stream.held
        message = stream.message
        position = stream.first_position
        token_id = expected_token(tuple(message.prompt_token_ids), position)
        stream.tokens(position, token_id)
        num_computed = len(message.prompt_token_ids) + position
        if position + 1 >= message.max_tokens:
            stream.close(pb.CLOSE_REASON_LENGTH, num_computed_tokens=num_computed)
            return
        self._commit(message.handoff.transfer_id).set_result(token_id)
        stream.close(pb.CLOSE_REASON_HANDED_OFF, num_computed_tokens=num_computed)

    async def decode(self, stream: FakeStream) -> None:
        message = stream.message
        num_computed = 0
        if message.HasField("handoff"):
            stream.reserve()
            await self._commit(message.handoff.transfer_id)
        else:
            num_computed = len(message.prompt_token_ids) + stream.first_position
        for position in range(stream.first_position, message.max_tokens):
            if stream.cancelled.is_set():
                return
            stream.tokens(position, expected_token(tuple(message.prompt_token_ids), position))
            await asyncio.sleep(0.001)
        stream.close(pb.CLOSE_REASON_LENGTH, num_computed_tokens=num_computed)
