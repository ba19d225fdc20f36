"""The workers as this gateway sees them: what the registry lists, and live Sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from baton.config import SessionConfig
from baton.records import Role, WorkerRecord
from baton.telemetry import GatewayMetrics
from router.routing.kv_index import KvIndex
from router.workers.handshake import GatewayIdentity
from router.workers.link import WorkerLink
from router.workers.session import WorkerSession


class WorkerPool:
    """Owns a link to every worker process, named by its epoch.

    While Redis is away ``update`` is not called, and what was known stays.
    """

    def __init__(
        self,
        *,
        identity: GatewayIdentity,
        config: SessionConfig,
        metrics: GatewayMetrics,
        index: KvIndex,
    ) -> None:
        self.index = index
        """What the workers' caches hold; fed by their Sessions."""
        self._identity = identity
        self._config = config
        self._metrics = metrics
        self._links: dict[str, WorkerLink] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False
        self._changed()

    @property
    def links(self) -> list[WorkerLink]:
        """Of every worker that is listed or has a live Session, in order of their names."""
        return sorted(self._links.values(), key=lambda link: link.record.worker_id)

    def update(self, records: Mapping[str, WorkerRecord]) -> None:
        """Takes over what the registry lists now: worker ids and their records."""
        if self._closed:
            return
        listed = {record.epoch: record for record in records.values()}
        for epoch, link in self._links.items():
            link.listed = epoch in listed
        for epoch, record in listed.items():
            if epoch not in self._links:
                self._links[epoch] = WorkerLink(
                    record,
                    identity=self._identity,
                    config=self._config,
                    index=self.index,
                    on_change=self._changed,
                    on_ended=self._forget,
                )
        self._changed()

    def sessions(self, role: Role) -> list[WorkerSession]:
        """Live Sessions of that role that may be given new streams."""
        return [
            link.session
            for link in self._links.values()
            if link.ready and link.session is not None and link.record.role == role
        ]

    @contextmanager
    def watched_by(self, event: asyncio.Event) -> Iterator[None]:
        """Sets ``event`` whenever a worker comes or goes, until the block is left."""
        self._watchers.add(event)
        try:
            yield
        finally:
            self._watchers.discard(event)

    async def close(self) -> None:
        """Loses every Session; the pool stays empty."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _forget(self, link: WorkerLink) -> None:
        self._links.pop(link.record.epoch, None)

    def _changed(self) -> None:
        for role in ("prefill", "decode"):
            live = [
                link for link in self._links.values() if link.session and link.record.role == role
            ]
            self._metrics.workers.labels(role=role).set(len(live))
        for event in self._watchers:
            event.set()
