"""The life of a worker process, from its first port to its last.

1. STARTING: ports are open, nobody knows of them. A Redis that is away is waited for.
2. SERVING: registered. It ends on ``stop``, on a lost registration, or when the
   engine thread dies.
3. DRAINING: deregistered, admits nothing; what runs may end within the bound.
4. STOPPED: what was left has been refused with an error that can be retried.

An engine that dies, or hangs, ends the worker at once in each of them: its streams go on
elsewhere as soon as its port is closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
from prometheus_client import CollectorRegistry, start_http_server
from redis.exceptions import RedisError

from baton.config import BatonConfig
from baton.errors import BatonError, ConfigurationError, DrainingError, InternalError
from baton.protocol import PROTOCOL_VERSION
from baton.records import Role, WorkerRecord
from baton.v1 import session_pb2 as pb
from baton.worker.address import joined
from baton.worker.engine_thread import EngineThread
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.registration import Registration

logger = logging.getLogger(__name__)

POLL_S = 0.05
ANSWER_S = 5.0
"""How long a step under way may hold up the last answers."""
FLUSH_S = 0.2
"""Time for the last events to leave before the port closes."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is; the same facts go to the registry and to gateways."""

    worker_id: str
    role: Role
    epoch: bytes
    model: str
    digest: bytes
    block_size: int
    num_blocks: int
    max_model_len: int
    kv_dtype: str
    generation: str
    num_ranks: int = 1
    """Told to the registry alone: it is nothing that gateways and hand-offs go by."""

    def welcome(self) -> pb.Welcome:
        return pb.Welcome(
            protocol_version=PROTOCOL_VERSION,
            generation=self.generation,
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            model=self.model,
            digest=self.digest,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            kv_dtype=self.kv_dtype,
        )

    def record(self, *, address: str, metrics_address: str) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch.hex(),
            protocol_version=PROTOCOL_VERSION,
            generation=self.generation,
            address=address,
            metrics_address=metrics_address,
            model=self.model,
            digest=self.digest.hex(),
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            num_ranks=self.num_ranks,
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at=time.time(),
        )


class LoopWorker(Protocol):
    """What both pools' workers offer to the process around them."""

    @property
    def idle(self) -> bool: ...

    def drain(self) -> None: ...

    def fail_all(self, error: BatonError) -> None: ...

    def step(self) -> bool: ...


def report_from(outbox: Outbox, metrics_page: bytes, *, session: int) -> pb.Report:
    """How the worker stood when a step last began or ended, with its metrics page, for the
    gateway of that Session."""
    standing = outbox.standing
    load = standing.load
    return pb.Report(
        num_steps=load.num_steps,
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_waiting_tokens=load.num_waiting_tokens,
        blocks=pb.BlockCounts(
            free=load.free,
            cached=load.cached,
            referenced=load.referenced,
            quarantined=load.quarantined,
        ),
        metrics=metrics_page,
        draining=load.draining,
        num_opens=standing.num_opens.get(session, 0),
        load_age_ms=max(0, round((outbox.clock() - standing.taken_at) * 1000)),
    )


class WorkerHost:
    """Starts, registers, drains and stops one worker; ``run`` is its whole life."""

    def __init__(
        self,
        *,
        config: BatonConfig,
        identity: Identity,
        worker: LoopWorker,
        inbox: Inbox,
        registry: CollectorRegistry,
        redis_url: str,
    ) -> None:
        self._config = config
        self._identity = identity
        self._worker = worker
        self._inbox = inbox
        self._registry = registry
        self._redis_url = redis_url
        self._fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread = EngineThread(inbox, step=worker.step, on_fatal=self._on_fatal)

    def _on_fatal(self, error: BaseException) -> None:
        if not self._fatal.done():
            self._fatal.set_exception(InternalError(f"the engine died: {error!r}"))

    async def run(
        self,
        server: grpc.aio.Server,
        *,
        advertise_host: str,
        stop: asyncio.Event,
    ) -> None:
        """Serves until ``stop``, on ``config.worker``'s ports; others find it at
        ``advertise_host``. Raises InternalError when the engine dies and
        ConfigurationError when a port or the registry cannot be had."""
        port = await self._listen(server)
        page, page_thread = self._serve_page()
        address = joined(advertise_host, port)
        registration = Registration(
            self._redis_url,
            self._identity.record(
                address=address,
                metrics_address=joined(advertise_host, page.server_address[1]),
            ),
            self._config.registry,
        )
        self._thread.start()
        watch = asyncio.create_task(self._watch_progress(), name="watch progress")
        try:
            if await self._register(registration, stop):
                logger.info("%s serves on %s", self._identity.worker_id, address)
            await self._until_over(stop, registration)
            await self._drain(registration)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await server.stop(grace=FLUSH_S)
            hangs = self._thread.round_age_s > self._config.engine.hang_s
            patience_s = 0.0 if hangs else self._config.worker.drain_s
            await asyncio.to_thread(self._thread.stop, timeout_s=patience_s)
            await asyncio.to_thread(page.shutdown)
            page.server_close()
            page_thread.join()
            logger.info("%s has stopped", self._identity.worker_id)

    async def _listen(self, server: grpc.aio.Server) -> int:
        """The port that it got."""
        wanted = joined(self._config.worker.host, self._config.worker.port)
        try:
            bound = server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise ConfigurationError(f"cannot listen on {wanted}: {error}") from None
        await server.start()
        return bound

    def _serve_page(self) -> tuple[Any, threading.Thread]:
        """The metrics page's server, and the thread that it runs in."""
        host, port = self._config.worker.host, self._config.worker.metrics_port
        try:
            return start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigurationError(
                f"worker.metrics_port: cannot listen on {joined(host, port)}: {error.strerror}"
            ) from None

    async def _register(self, registration: Registration, stop: asyncio.Event) -> bool:
        """Whether it is registered; False when the worker is to end before. The controller
        counts no time without Redis, so the bound of a start is held here."""
        bound_s = self._config.cluster.start_timeout_s
        starting = asyncio.ensure_future(registration.start(within_s=bound_s))
        stopped = asyncio.ensure_future(stop.wait())
        waits: set[asyncio.Future[Any]] = {starting, stopped, self._fatal}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            return starting.done()
        except (RedisError, OSError) as error:
            await registration.close()
            raise ConfigurationError(
                f"cannot register: the Redis at REDIS_URL does not answer ({error}); "
                f"it was waited for as long as a start may take, {bound_s:g} s"
            ) from error
        finally:
            for task in (starting, stopped):
                task.cancel()
            await asyncio.gather(starting, stopped, return_exceptions=True)

    async def _until_over(self, stop: asyncio.Event, registration: Registration) -> None:
        waits: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._fatal),
            asyncio.ensure_future(stop.wait()),
            asyncio.ensure_future(registration.lost.wait()),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits[1:]:
            task.cancel()
        if self._fatal.done():
            await registration.close()
            self._fatal.result()

    async def _watch_progress(self) -> None:
        """Declares the engine dead when one step takes longer than ``engine.hang_s``, also
        while the worker leaves: a drain may be far longer."""
        bound_s = self._config.engine.hang_s
        while not self._fatal.done():
            await asyncio.sleep(min(1.0, bound_s / 4))
            if self._thread.round_age_s > bound_s and not self._fatal.done():
                self._on_fatal(TimeoutError(f"no progress for {bound_s:g} s"))

    async def _drain(self, registration: Registration) -> None:
        await registration.close()
        self._inbox.post(self._worker.drain)
        bound_s = 0.0 if registration.lost.is_set() else self._config.worker.drain_s
        ends_at = time.monotonic() + bound_s
        await self._engine_round(ends_at)  # what came before is known to the worker then
        while time.monotonic() < ends_at and not self._fatal.done():
            if self._worker.idle:
                break
            await asyncio.sleep(POLL_S)
        if not self._fatal.done():
            await self._refuse_the_rest()
        if self._fatal.done():
            self._fatal.result()

    async def _refuse_the_rest(self) -> None:
        self._inbox.post(
            self._worker.fail_all,
            DrainingError(f"{self._identity.worker_id} has gone away"),
        )
        # Told in one round, sent with the step that follows: by the second it has left.
        answered_by = time.monotonic() + ANSWER_S
        for _ in range(2):
            await self._engine_round(answered_by)
        await asyncio.sleep(FLUSH_S)

    async def _engine_round(self, until: float) -> None:
        """Until the engine thread has come to what was posted before, or to ``until`` on
        the monotonic clock: a step may take long, a dead engine never comes."""
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.post(self._inbox.call, came.set_result, None)
        await asyncio.wait(
            {came, self._fatal},
            timeout=max(0.0, until - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
