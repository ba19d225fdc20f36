"""The workers as this gateway sees them: what the registry lists, and live Sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from baton.config import RegistryConfig, SessionConfig
from baton.records import Role, WorkerRecord
from baton.telemetry import GatewayMetrics
from router.routing.kv_index import KvIndex
from router.routing.misfits import strangers, without_partner
from router.workers.handshake import GatewayIdentity
from router.workers.link import WorkerLink
from router.workers.session import WorkerSession

logger = logging.getLogger(__name__)

RECENT_S = 300.0
"""A decode worker that was lost so long ago may still be replaced: a pod starts in minutes."""


class WorkerPool:
    """Owns a link to every worker process, named by its epoch.

    While Redis is away ``update`` is not called, and what was known stays. A process
    that is listed no more and has a live Session counts as listed for ``registry.ttl_s``:
    a Redis that has lost its memory hears of every worker again in that time. One whose
    name another process has taken, or that has said that it is leaving, does not.
    """

    def __init__(
        self,
        *,
        identity: GatewayIdentity,
        config: SessionConfig,
        registry: RegistryConfig,
        metrics: GatewayMetrics,
        index: KvIndex,
        clock: Callable[[], float],
    ) -> None:
        """``clock`` gives seconds."""
        self.index = index
        """What the workers' caches hold; fed by their Sessions."""
        self._identity = identity
        self._config = config
        self._registry = registry
        self._clock = clock
        self._updated_at = clock()
        self._metrics = metrics
        self._links: dict[str, WorkerLink] = {}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False
        self._complaint: str | None = None
        self._lengths: set[int] = set()
        """What the ready decode workers hold, in tokens."""
        self._lost_lengths: dict[int, float] = {}
        """What those held that were ready, and when the last such one was lost."""
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
        # Time counts while Redis is there: workers that it has forgotten can tell it then.
        now = self._clock()
        passed_s = min(now - self._updated_at, self._registry.heartbeat_s)
        self._updated_at = now
        for epoch, link in self._links.items():
            link.unlisted_s = 0.0 if epoch in listed else link.unlisted_s + passed_s
            link.listed = epoch in listed or (link.listed and self._is_forgotten(link, records))
        for epoch, record in listed.items():
            if epoch not in self._links:
                self._links[epoch] = WorkerLink(
                    record,
                    identity=self._identity,
                    config=self._config,
                    index=self.index,
                    metrics=self._metrics,
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

    def recent_max_model_len(self) -> int | None:
        """Tokens that the largest decode worker holds which is ready or was, within
        ``RECENT_S``; None where there was none."""
        since = self._clock() - RECENT_S
        lost = [length for length, lost_at in self._lost_lengths.items() if lost_at >= since]
        return max([*self._lengths, *lost], default=None)

    def _note_lengths(self) -> None:
        lengths = {session.record.max_model_len for session in self.sessions("decode")}
        now = self._clock()
        self._lost_lengths |= dict.fromkeys(self._lengths - lengths, now)
        self._lost_lengths = {
            length: lost_at
            for length, lost_at in self._lost_lengths.items()
            if length not in lengths and lost_at >= now - RECENT_S
        }
        self._lengths = lengths

    def _is_forgotten(self, link: WorkerLink, records: Mapping[str, WorkerRecord]) -> bool:
        """Redis has perhaps lost its memory, and the worker is where it was."""
        session = link.session
        return (
            session is not None
            and not session.draining
            and link.record.worker_id not in records
            and link.unlisted_s < self._registry.ttl_s
        )

    def without_partner(self) -> str | None:
        """Names live workers that none of the other role can be paired with, and says why."""
        return without_partner(self.sessions("prefill"), self.sessions("decode"))

    def strangers(self, role: Role) -> str | None:
        """Names listed workers of that role which are of no use to this gateway, and says why."""
        listed = [link.record for link in self.links if link.listed and link.record.role == role]
        return strangers(listed, self._identity.generation)

    def knows(self, epoch: bytes) -> bool:
        """The process is listed or has a live Session."""
        return epoch.hex() in self._links

    @contextmanager
    def watched_by(self, event: asyncio.Event) -> Iterator[None]:
        """Sets ``event`` whenever a worker comes or goes, until the block is left."""
        self._watchers.add(event)
        try:
            yield
        finally:
            self._watchers.discard(event)

    def count_indexed_blocks(self) -> None:
        """Brings the gauge of the KV index's size up to date."""
        for role in ("prefill", "decode"):
            epochs = [
                bytes.fromhex(epoch)
                for epoch, link in self._links.items()
                if link.record.role == role
            ]
            num_blocks = sum(map(self.index.num_indexed_blocks, epochs))
            self._metrics.kv_index_blocks.labels(role=role).set(num_blocks)

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
        complaint = self.without_partner()
        if complaint is not None and complaint != self._complaint:
            logger.warning("%s", complaint)
        self._complaint = complaint
        self._note_lengths()
        for event in self._watchers:
            event.set()
