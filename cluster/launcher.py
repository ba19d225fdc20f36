"""Starts and stops one machine's cluster: Redis, Ray, gateway and workers.

1. STARTING: everything is begun at once. A process that dies now fails the start,
   with the end of its log.
2. SERVING: the reconciler replaces what dies.
3. STOPPING: the gateway drains; then the workers, Redis and Ray are ended, each
   within a bound, after which it is killed. Nothing is left, also on disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baton.config import BatonConfig
from baton.errors import UnavailableError
from baton.worker.environment import worker_environment
from cluster import redis_server
from cluster.backend import PoolBackend
from cluster.console import Progress
from cluster.janitor_client import Janitor
from cluster.processes_backend import Command, ProcessesBackend
from cluster.readiness import wait_ready
from cluster.reconciler import Reconciler, WorkerEvent
from cluster.server_client import ServerStatus, url_of
from cluster.state import RunFolder

logger = logging.getLogger(__name__)

_ABORT_S = 1.0
"""How long processes may take to end that have served nobody yet."""


MODULES: Mapping[str, str] = {
    "gateway": "router.main",
    "prefill": "prefill_workers.main",
    "decode": "decode_workers.main",
}
"""What `python -m` runs for each role, where it is a process of ours."""


class Launcher:
    """One cluster, from its first process to its last. Owns all of them.

    ``restore_signals`` is called after a library has put its own handlers in place.
    """

    def __init__(
        self,
        config: BatonConfig,
        *,
        folder: RunFolder,
        temp_folder: Path,
        redis_url: str | None,
        progress: Progress,
        restore_signals: Callable[[], None] = lambda: None,
        modules: Mapping[str, str] = MODULES,
    ) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._restore_signals = restore_signals
        self._modules = modules
        self._secret = os.environ.get("BATON_SECRET") or secrets.token_hex(32)
        self._janitor = Janitor(temp_folder)
        self._private = redis_server.prepare(temp_folder) if redis_url is None else None
        self._redis_url = redis_url or (self._private.url if self._private else "")
        self._processes = ProcessesBackend(
            self._command, log_folder=folder.logs, on_started=self._janitor.watch
        )
        self._pools: PoolBackend = self._processes
        if config.cluster.backend == "ray":
            self._pools = self._ray_backend(temp_folder)
        self._reconciler = Reconciler(on_event=self._on_event)
        self._loop_task: asyncio.Task[None] | None = None
        self._first_death: asyncio.Future[WorkerEvent] | None = None
        self._serving = False

    def _ray_backend(self, temp_folder: Path) -> PoolBackend:
        from cluster.ray_backend import RayBackend

        return RayBackend(
            self._config,
            secret=self._secret,
            redis_url=self._redis_url,
            log_folder=self._folder.logs,
            temp_folder=temp_folder,
            on_started=self._janitor.watch,
            on_connected=self._restore_signals,
        )

    def _command(self, role: str, worker_id: str) -> Command:
        if role == "redis":
            assert self._private is not None
            return Command(self._private.arguments)
        secrets_of_all = {"BATON_SECRET": self._secret, "REDIS_URL": self._redis_url}
        environment = worker_environment(os.environ) | secrets_of_all
        name = "--gateway-id" if role == "gateway" else "--worker-id"
        # -P: a folder named like one of our packages, where the user stands, is not it.
        arguments = (
            *(sys.executable, "-P", "-m", self._modules[role]),
            *("--config", str(self._folder.config_file)),
            *(name, worker_id),
        )
        return Command(arguments, environment)

    def _on_event(self, event: WorkerEvent) -> None:
        if event.kind != "died":
            return
        if self._serving:
            again = f"starting it again in {event.retry_in_s:.1f} s"
            self._progress.warn(f"{event.worker_id} {event.reason}; {again}")
        elif self._first_death is not None and not self._first_death.done():
            self._first_death.set_result(event)

    # ------------------------------------------------------------------ start

    async def start(self) -> ServerStatus:
        """Returns once every worker is ready. Raises BatonError when that fails;
        ``stop`` must be called all the same."""
        config = self._config
        self._first_death = asyncio.get_running_loop().create_future()
        self._loop_task = asyncio.create_task(self._reconciler.run(), name="reconciler")
        everything = asyncio.create_task(self._bring_up(), name="bring up")
        limit_s = config.cluster.start_timeout_s
        try:
            waits: list[asyncio.Future[Any]] = [everything, self._first_death]
            await asyncio.wait(
                waits,
                timeout=limit_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if everything.done():
                self._serving = True
                return everything.result()
            if self._first_death.done():
                raise UnavailableError(self._death_sentence(self._first_death.result()))
            raise UnavailableError(
                f"not everything was ready within {limit_s:.0f} s (cluster.start_timeout_s); "
                f"what has come so far is in {self._folder.logs}"
            )
        finally:
            everything.cancel()
            await asyncio.gather(everything, return_exceptions=True)

    async def _bring_up(self) -> ServerStatus:
        config, progress = self._config, self._progress
        pools = {role: config.num_replicas(role) for role in ("prefill", "decode")}
        with progress.waiting("waiting for Redis"):
            if self._private is not None:
                self._reconciler.want("redis", ["redis"], self._processes)
            await redis_server.wait_answers(self._redis_url, timeout_s=10.0)
            progress.done("Redis answers" if self._private is None else "Redis runs")
            for role, replicas in pools.items():
                self._reconciler.want(role, [f"{role}-{i}" for i in range(replicas)], self._pools)
            self._reconciler.want("gateway", ["gateway-0"], self._processes)
            return await wait_ready(
                url_of(config.gateway.host, config.gateway.port), pools, progress
            )

    async def wait_lost(self) -> str:
        """Returns once the cluster cannot be kept up any more, saying why."""
        return await self._pools.wait_lost()

    def _death_sentence(self, event: WorkerEvent) -> str:
        lines = self._folder.log_tail(event.worker_id)
        sentence = f"{event.worker_id} {event.reason} while the cluster was starting"
        if not lines:
            return sentence
        log = self._folder.logs / f"{event.worker_id}.log"
        return "\n    ".join([f"{sentence}; the end of {log}:", *lines])

    # ------------------------------------------------------------------- stop

    async def stop(self, hurry: asyncio.Event) -> bool:
        """Ends everything, whatever state it is in. Once ``hurry`` is set, at once.

        Returns False when Ray did not let go: this process should then end without
        waiting for its threads.
        """
        began = time.monotonic()
        limit_s = self._config.cluster.stop_timeout_s if self._serving else _ABORT_S
        drain_s = self._config.gateway.drain_s if self._serving else 0.0
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        stop = self._reconciler.stop
        killed = await stop(["gateway"], limit_s=drain_s + limit_s, hurry=hurry)
        killed += await stop(["prefill", "decode"], limit_s=limit_s, hurry=hurry)
        clean, redis_killed = await asyncio.gather(
            self._close_pools(hurry), stop(["redis"], limit_s=limit_s, hurry=hurry)
        )
        await asyncio.to_thread(self._janitor.finish)
        logger.info("stopped in %.1f s", time.monotonic() - began)
        if (killed := killed + redis_killed) and self._serving and not hurry.is_set():
            self._progress.warn(f"processes that had to be killed: {killed}")
        return clean

    async def _close_pools(self, hurry: asyncio.Event) -> bool:
        closing = asyncio.ensure_future(self._pools.close())
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait(
            {closing, hurried},
            timeout=self._config.cluster.stop_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (closing, hurried):
            task.cancel()
        result, _ = await asyncio.gather(closing, hurried, return_exceptions=True)
        if result is not True:
            logger.error("the backend did not let go: %r", result)
        return result is True
