"""The gRPC side of a prefill worker's hand-off: one ``Pull`` stream per decode worker.

A stream is greeted (who are you, what do we share, which transport), then read
and written until the peer goes, its transport fails or the worker closes. What
the messages mean is the owner's business (``service.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import grpc
import grpc.aio

from baton.config import KvTransferConfig
from baton.errors import ConfigurationError, InternalError
from baton.faults import Faults
from kv_transfer import handshake
from kv_transfer.connection import DecodeConnection
from kv_transfer.keys import TransferKey
from kv_transfer.transports.base import LinkError, ServeLink, ServeTransport
from kv_transfer.usable_transports import UsableTransports
from kv_transfer.v1 import transfer_pb2 as pb
from kv_transfer.v1.transfer_pb2_grpc import TransferServicer

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.PullRequest, pb.PullResponse]


class PullServicer(TransferServicer):
    """Calls, on the event loop: ``received`` for every message after the greeting,
    ``held_back`` where a fault point refused to let one through, ``lost`` once per
    connection that had been greeted."""

    def __init__(
        self,
        *,
        identity: handshake.Identity,
        config: KvTransferConfig,
        transports: Mapping[str, ServeTransport],
        faults: Faults,
        received: Callable[[DecodeConnection, pb.PullRequest], None],
        held_back: Callable[[TransferKey, InternalError], None],
        lost: Callable[[DecodeConnection], None],
    ) -> None:
        self._identity = identity
        self._config = config
        self._transports = dict(transports)
        self._usable = UsableTransports(tuple(transports))
        self._faults = faults
        self._received = received
        self._held_back = held_back
        self._lost = lost
        self._connections: set[DecodeConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[Any]] = set()
        self._started = False

    async def start(self) -> None:
        """Raises ConfigurationError where a transport that is required cannot work."""
        required = handshake.required_transports(self._config)
        for name, transport in self._transports.items():
            if name not in (*handshake.SAME_HOST, *required):
                continue  # made ready when first used: most clusters never do
            try:
                await transport.start()
            except LinkError as error:
                if name in required:
                    raise ConfigurationError(f"kv_transfer requires {name}: {error}") from error
                logger.warning("%s: no %s here: %s", self._identity.worker_id, name, error)
                self._usable.remove(name)
        self._started = True

    async def close(self) -> None:
        """Ends every stream and returns when no transport touches the pool any more."""
        self._started = False
        for connection in self._connections:
            connection.lose(f"{self._identity.worker_id} is going away")
        if self._streams:
            await asyncio.wait(self._streams)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self._transports.values():
            await transport.close()

    # A coroutine that writes to its context, which the generated base does not foresee.
    async def Pull(  # type: ignore[override]
        self, request_iterator: object, context: Context
    ) -> None:
        hello = await self._read_hello(context)
        await self._faults.wait("prefill.greet")
        await self._check_serving(context)
        connection = DecodeConnection(hello, self._faults)
        welcome = handshake.make_welcome(self._identity, verify=self._config.verify)
        stream = asyncio.current_task()
        assert stream is not None
        self._streams.add(stream)
        stream.add_done_callback(self._streams.discard)
        link = connection.link = await self._open(hello, welcome, connection, context)
        if not self._started:
            self._spawn(self._let_go(link, []))
            await self._check_serving(context)
        self._connections.add(connection)
        tasks = [
            asyncio.create_task(self._read(connection, context)),
            asyncio.create_task(self._write(connection, context, welcome)),
            asyncio.create_task(self._connect(connection, link)),
        ]
        try:
            reason = await connection.lost
        finally:
            for task in tasks:
                task.cancel()
            self._connections.discard(connection)
            connection.rendezvous.close()
            self._lost(connection)
            self._spawn(self._let_go(link, tasks))
        if reason:
            logger.info("%s lets go of %s: %s", self._identity.worker_id, hello.worker_id, reason)
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    async def _check_serving(self, context: Context) -> None:
        if not self._started:
            not_serving = f"{self._identity.worker_id} is not serving"
            await context.abort(grpc.StatusCode.UNAVAILABLE, not_serving)

    async def _read_hello(self, context: Context) -> pb.PeerHello:
        """Refuses, before anything else is done, a peer that this worker must not serve."""
        await self._check_serving(context)
        first: object = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.attach_s):
                first = await context.read()
        if first is None:
            late = f"no PeerHello in {self._config.attach_s:g} s"
            await context.abort(grpc.StatusCode.UNAVAILABLE, late)
        if not isinstance(first, pb.PullRequest) or not first.HasField("hello"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message must be PeerHello"
            )
        reason = handshake.refuse_hello(first.hello, self._identity)
        if reason is not None:
            logger.warning("refused %s: %s", first.hello.worker_id, reason)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        return first.hello

    async def _open(
        self,
        hello: pb.PeerHello,
        welcome: pb.PeerWelcome,
        connection: DecodeConnection,
        context: Context,
    ) -> ServeLink:
        """A link over the first transport that works for both."""
        while True:
            allowed = self._usable.names()
            name, reason = handshake.choose_transport(hello, self._identity, allowed)
            if name is None and self._usable.reason:
                await context.abort(grpc.StatusCode.UNAVAILABLE, self._usable.reason)
            if name is None:
                logger.warning("refused %s: %s", hello.worker_id, reason)
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
            assert name is not None
            try:
                transport = self._transports[name]
                return await transport.open(welcome, connection.lose, connection.rendezvous)
            except LinkError as error:
                if name == allowed[-1]:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
                logger.warning("%s: no %s here: %s", self._identity.worker_id, name, error)
                self._usable.leave_out(name, str(error))

    async def _read(self, connection: DecodeConnection, context: Context) -> None:
        """An empty reason means that the peer closed the stream in order."""
        try:
            while isinstance(request := await context.read(), pb.PullRequest):
                if request.HasField("rendezvous"):
                    value = request.rendezvous
                    connection.rendezvous.received(value.key, value.value)
                    continue
                try:
                    if request.HasField("release"):
                        await self._faults.wait("prefill.release")
                except InternalError as error:
                    self._held_back(TransferKey.from_proto(request.release.key), error)
                else:
                    self._received(connection, request)
            connection.lose("")
        except Exception as error:
            logger.exception("%s: stream of %s", self._identity.worker_id, connection.worker_id)
            connection.lose(f"reading the stream failed: {error!r}")

    async def _write(
        self, connection: DecodeConnection, context: Context, welcome: pb.PeerWelcome
    ) -> None:
        try:
            await context.write(pb.PullResponse(welcome=welcome))
            await connection.write(context.write, self._held_back)
        except Exception as error:
            connection.lose(f"writing the stream failed: {error!r}")

    async def _connect(self, connection: DecodeConnection, link: ServeLink) -> None:
        try:
            await self._faults.wait("prefill.link")
            await link.connect()
        except (LinkError, InternalError) as error:
            connection.lose(str(error))
        except Exception as error:
            logger.exception("%s: no link to %s", self._identity.worker_id, connection.worker_id)
            connection.lose(f"making the link failed: {error!r}")

    async def _let_go(self, link: ServeLink, tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        await link.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
