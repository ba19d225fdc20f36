"""This gateway's tie to one registered worker process, through all its Sessions.

1. CONNECTING: no Session is live; one is tried for, with a growing pause.
2. LIVE: ``session`` carries streams.
3. ENDED: the registry lists the process no more and no Session is live.

A worker that leaves the registry while LIVE, or says that it is leaving, gets no new
streams, and its Session goes on until the worker ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc.aio

from baton import rpc
from baton.config import SessionConfig
from baton.errors import BatonError
from baton.records import WorkerRecord
from baton.telemetry import GatewayMetrics
from router.routing.kv_index import KvIndex
from router.workers.handshake import GatewayIdentity, greet
from router.workers.session import WorkerSession

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class WorkerLink:
    """Keeps a Session with one worker process; ``on_change`` hears when one comes or goes."""

    def __init__(
        self,
        record: WorkerRecord,
        *,
        identity: GatewayIdentity,
        config: SessionConfig,
        index: KvIndex,
        metrics: GatewayMetrics,
        on_change: Callable[[], None],
        on_ended: Callable[[WorkerLink], None],
    ) -> None:
        self.record = record
        self.session: WorkerSession | None = None
        self.listed = True
        """The registry lists this process, as far as is known; set by the pool."""
        self.unlisted_s = 0.0
        """For how long Redis has been there and has not listed it; kept by the pool."""
        self._identity = identity
        self._config = config
        self._index = index
        self._metrics = metrics
        self._on_change = on_change
        self._on_ended = on_ended
        self._task = asyncio.create_task(self._run(), name=f"link {record.worker_id}")
        self._task.add_done_callback(self._ended)

    @property
    def ready(self) -> bool:
        """It may be given new streams."""
        session = self.session
        return self.listed and session is not None and not (session.lost or session.draining)

    @property
    def draining(self) -> bool:
        """The worker has said that it is leaving."""
        return self.session is not None and self.session.draining

    async def close(self) -> None:
        """Loses the Session, if there is one, and ends."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the link to %s failed", self.record.worker_id, exc_info=error)
        self._on_ended(self)

    async def _run(self) -> None:
        channel = rpc.channel(self.record.address, self._config)
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PAUSE_S
        complaint = None
        try:
            while self.listed:
                began = loop.time()
                try:
                    await self._live(await self._connect(channel))
                except BatonError as error:
                    if error.message != complaint:
                        complaint = error.message
                        logger.warning("no Session with %s: %s", self.record.worker_id, complaint)
                if loop.time() - began > LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
                if self.listed:
                    await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            await channel.close()

    async def _connect(self, channel: grpc.aio.Channel) -> WorkerSession:
        call, welcome = await greet(
            self.record, channel, identity=self._identity, config=self._config
        )
        return WorkerSession(
            self.record,
            call,
            self._config,
            kv_dtype=welcome.kv_dtype,
            index=self._index,
            metrics=self._metrics,
        )

    async def _live(self, session: WorkerSession) -> None:
        """Runs the Session to its end."""
        worker_id = self.record.worker_id
        logger.info("Session with %s (%s) is live", worker_id, self.record.address)
        self.session = session
        self._on_change()
        try:
            reason = await session.run()
            logger.warning("Session with %s is lost: %s", worker_id, reason)
        finally:
            self.session = None
            self._on_change()
