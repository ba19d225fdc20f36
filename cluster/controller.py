"""The pool controller: owns the pools' desired sizes and has them carried out.

From ``begin`` on workers are started, watched, fenced, replaced and retired; wishes
are stored in Redis first and carried out then. After ``close`` the workers go on
running; whoever wants them gone calls ``stop_workers``. Of all processes that could
control the same pools, the one that has the lease may (``lease``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from baton.config import BatonConfig
from baton.errors import BatonError, InvalidRequestError, UnavailableError
from baton.records import Role
from baton.telemetry import ControllerMetrics
from cluster.backend import PoolBackend, Started
from cluster.controller_store import ControllerStore, RegistryRead
from cluster.fencing import Fencing
from cluster.reconciler import Reconciler
from cluster.sizes import (
    configured_sizes,
    free_ids,
    pool_of,
    sizes_to_begin_with,
    who_leaves,
    wished_sizes,
    wishes_of,
)
from cluster.slots import SlotView, WorkerEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool, as the controller's API shows it."""

    role: Role
    desired: int
    running: int
    """Workers that have a process, without those that are leaving."""
    ready: int
    """Of these, the ones that are registered."""
    leaving: int
    max_replicas: int


class PoolController:
    """Of one cluster; everything on one event loop."""

    def __init__(
        self,
        config: BatonConfig,
        *,
        backend: PoolBackend,
        store: ControllerStore,
        metrics: ControllerMetrics,
        on_event: Callable[[WorkerEvent], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        is_sole: Callable[[], bool] = lambda: True,
    ) -> None:
        """Nothing is started, and no size is written, while ``is_sole`` does not say that no
        other controller can have the pools."""
        self._config = config
        self._backend = backend
        self._store = store
        self._metrics = metrics
        self._tell_event = on_event
        self._clock = clock
        self._is_sole = is_sole
        self._reconciler = Reconciler(
            clock=clock, on_event=self._on_event, may_start=is_sole, told_who_serves=True
        )
        self._fencing = Fencing(
            fence_s=config.cluster.fence_s,
            start_timeout_s=config.cluster.start_timeout_s,
            ttl_s=config.registry.ttl_s,
            drain_limit_s=self._leave_s,
        )
        self._desired = configured_sizes(config)
        self._wishing = asyncio.Lock()
        self._outdated: dict[str, str] = {}
        """Generation of every registered worker that has another one than we."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._closed = False
        self._complaint = ""
        for pool in config.pools:
            for cause in ("died", "fenced", "start_timeout"):
                metrics.replacements.labels(pool=pool, cause=cause)

    # ------------------------------------------------------------- begin, end

    async def begin(self, *, anew: bool) -> None:
        """Takes the pools up, once; this process must have the lease.

        ``anew``: with the configured sizes, and nothing that runs already. Otherwise with
        what was wished before, and with the workers that an earlier controller left.
        Raises BatonError.
        """
        stored = None if anew else await self._store.read_wishes()
        self._desired = sizes_to_begin_with(self._config, stored)
        adopted = {} if anew else await self._backend.adopt()
        new = [
            name
            for pool, desired in self._desired.items()
            for name in free_ids(pool, adopted, desired)
        ]
        await self._note_old_records(new)
        await self._store.write_wishes(self._wishes())
        for worker_id, process in sorted(adopted.items()):
            self._adopt(worker_id, process)
        if adopted:  # who of them serves, and who is leaving already, says where too many are
            asked_at = self._clock()
            self._fence(await self._store.read(sorted(adopted)), asked_at)
        for pool in self._desired:
            self._carry_out(pool)
        self._tasks = [
            asyncio.create_task(self._reconciler.run(), name="reconciler"),
            asyncio.create_task(self._watch(), name="controller"),
        ]

    def _adopt(self, worker_id: str, process: Started) -> None:
        """One of a pool that is not there any more goes, as do those that are too many."""
        pool = pool_of(worker_id, self._config.pools)
        self._reconciler.adopt(pool or worker_id, worker_id, process, self._backend)
        if pool is None:
            self._reconciler.retire(worker_id, limit_s=self._leave_s(None))

    async def stop_workers(self, *, limit_s: float, hurry: asyncio.Event) -> int:
        """Nothing is started any more, and every worker is stopped. Returns how many had
        to be killed; see ``Reconciler.stop``."""
        await self.close()
        pools = sorted({slot.pool for slot in self._reconciler.slots()})
        return await self._reconciler.stop(pools, limit_s=limit_s, hurry=hurry)

    async def close(self) -> None:
        """Lets go of the pools; what runs goes on running. Idempotent."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ sizes

    def pools(self) -> dict[str, PoolStatus]:
        """Every pool as it is now."""
        slots = self._reconciler.slots()
        return {name: self._pool_status(name, slots) for name in self._config.pools}

    def _pool_status(self, name: str, slots: list[SlotView]) -> PoolStatus:
        pool = self._config.pools[name]
        ours = [slot for slot in slots if slot.pool == name]
        running = [s.worker_id for s in ours if s.process is not None and not s.leaving]
        return PoolStatus(
            role=pool.role,
            desired=self._desired[name],
            running=len(running),
            ready=sum(map(self._fencing.is_registered, running)),
            leaving=sum(slot.leaving for slot in ours),
            max_replicas=pool.max_replicas,
        )

    @property
    def registry_up(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return not self._complaint

    async def wish(self, wish: Mapping[str, Any]) -> None:
        """Changes desired sizes, of the pools that ``wish`` names.

        Raises InvalidRequestError for a wish that cannot be met and UnavailableError when
        it cannot be stored; nothing has changed then.
        """
        try:
            async with self._wishing:
                await self._wish(wish)
        except BatonError as error:
            refused = isinstance(error, InvalidRequestError)
            self._metrics.wishes.labels(outcome="refused" if refused else "unavailable").inc()
            raise
        self._metrics.wishes.labels(outcome="accepted").inc()

    async def _wish(self, wish: Mapping[str, Any]) -> None:
        if self._closed:
            raise UnavailableError("this controller is going away; try again")
        sizes = wished_sizes(self._config, self._desired, wish)
        try:
            new = [name for pool in wish for name in self._new_ids(pool, sizes[pool])]
            await self._note_old_records(new)
            if not self._is_sole():
                raise UnavailableError("another controller may have taken over in Redis")
            await self._store.write_wishes(self._wishes(sizes))
        except UnavailableError as error:
            raise UnavailableError(
                f"{error.message}; nothing was changed, as sizes are kept there; try again"
            ) from error
        self._desired = sizes
        for pool in wish:
            self._carry_out(pool)
        logger.info("desired sizes: %s", sizes)

    def _wishes(self, sizes: Mapping[str, int] | None = None) -> bytes:
        return wishes_of(self._config, sizes or self._desired).model_dump_json().encode()

    def _staying(self, pool: str) -> list[SlotView]:
        return [s for s in self._reconciler.slots() if s.pool == pool and not s.leaving]

    def _new_ids(self, pool: str, desired: int) -> list[str]:
        """Names for the workers that ``pool`` lacks: those of slots that are there, the
        leaving ones too, are not free."""
        taken = [slot.worker_id for slot in self._reconciler.slots()]
        return free_ids(pool, taken, max(0, desired - len(self._staying(pool))))

    def _carry_out(self, pool: str) -> None:
        """Adds or retires slots until the pool has as many as it should."""
        desired, staying = self._desired[pool], self._staying(pool)
        self._reconciler.want(pool, self._new_ids(pool, desired), self._backend)
        leaving = who_leaves(
            staying,
            max(0, len(staying) - desired),
            is_registered=self._fencing.is_registered,
            is_outdated=self._outdated.__contains__,
        )
        for worker_id in leaving:
            self._reconciler.retire(worker_id, limit_s=self._leave_s(pool))

    def _leave_s(self, pool: str | None) -> float:
        """How long a worker of ``pool`` may take to drain, to flush and to end."""
        worker = (self._config.for_pool(pool) if pool is not None else self._config).worker
        return worker.drain_s + self._config.cluster.stop_timeout_s

    # --------------------------------------------------------------- watching

    async def _watch(self) -> None:
        # Cancelling is not enough: redis uses asyncio.wait_for, which before Python 3.12
        # can swallow it (https://github.com/python/cpython/issues/86296).
        while not self._closed:
            await asyncio.sleep(self._config.registry.poll_s)
            try:
                await self.look()
            except Exception:
                logger.exception("looking after the pools failed")

    async def look(self) -> None:
        """One look at Redis: kills what has vanished there, and writes what has changed
        or what a Redis that was restarted has lost."""
        try:
            asked_at = self._clock()
            read = await self._store.read([s.worker_id for s in self._reconciler.slots()])
            self._fence(read, asked_at)
            if self._is_sole():
                await self._write_again(read)
        except UnavailableError as error:
            self._fencing.unanswered()
            self._complain(error.message)
        else:
            self._complain("")

    async def _write_again(self, read: RegistryRead) -> None:
        if read.wishes != self._wishes() and not self._wishing.locked():
            await self._store.write_wishes(self._wishes())
        if read.served != (served := self._fencing.served()):
            await self._store.write_served(served)

    def _fence(self, read: RegistryRead, asked_at: float) -> None:
        verdicts = self._fencing.answered(read, self._reconciler.slots(), asked_at)
        for verdict in verdicts:
            self._reconciler.kill(verdict.worker_id, verdict.cause, verdict.reason)
        for worker_id in filter(self._fencing.is_registered, self._reconciler.running()):
            self._reconciler.serves(worker_id)
        self._note_outdated(read)

    def _note_outdated(self, read: RegistryRead) -> None:
        """An earlier controller may have started it, by another configuration."""
        ours, before = self._config.generation, self._outdated
        self._outdated = {
            worker_id: found.generation
            for worker_id, found in read.workers.items()
            if found.generation != ours and self._fencing.is_registered(worker_id)
        }
        for worker_id in self._outdated.keys() - before.keys():
            logger.warning(
                "%s is of generation %r and our gateways are of %r: it serves none of them, "
                "and is the first to leave when its pool is made smaller",
                worker_id, self._outdated[worker_id], ours,
            )  # fmt: skip

    def _complain(self, complaint: str) -> None:
        if complaint and not self._complaint:
            logger.warning("sizes stay as they are: %s", complaint)
        elif self._complaint and not complaint:
            logger.info("Redis answers again")
        self._complaint = complaint

    async def _note_old_records(self, worker_ids: list[str]) -> None:
        """What these names' records say now is of processes before ours."""
        self._fencing.remember(await self._store.read(worker_ids))

    def _on_event(self, event: WorkerEvent) -> None:
        if event.kind == "died" and event.pool in self._config.pools:
            self._metrics.replacements.labels(pool=event.pool, cause=event.cause).inc()
        self._tell_event(event)

    def publish(self) -> None:
        """Brings the metrics of the pools up to date."""
        for name, status in self.pools().items():
            labels = {"pool": name, "role": status.role}
            self._metrics.desired.labels(**labels).set(status.desired)
            self._metrics.running.labels(**labels).set(status.running)
            self._metrics.ready.labels(**labels).set(status.ready)
            self._metrics.leaving.labels(**labels).set(status.leaving)
