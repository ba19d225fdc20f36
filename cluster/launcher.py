"""Starts and stops one machine's cluster: Redis, Ray, gateways, controller and workers.

1. STARTING: everything is begun at once. A process that dies now fails the start,
   with the end of its log.
2. SERVING: what dies is replaced: Redis and gateways by a reconciler of the
   launcher's own, workers by that of the pool controller, which also scales them.
3. STOPPING: nothing is scaled or replaced any more; the gateways drain; then the
   workers, Redis and Ray are ended, each within a bound, after which it is killed.
   Nothing is left, also on disk.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

from baton.config import BatonConfig
from baton.credentials import CLUSTER_SECRET, credential
from baton.errors import UnavailableError
from cluster import redis_server
from cluster.backend import PoolBackend
from cluster.commands import MODULES, Commands
from cluster.console import Progress
from cluster.embedded_controller import EmbeddedController
from cluster.janitor_client import Janitor
from cluster.processes_backend import Command, ProcessesBackend
from cluster.readiness import wait_ready
from cluster.reconciler import PROOF_S, Reconciler
from cluster.server_client import ServerStatus, url_of
from cluster.slots import WorkerEvent
from cluster.state import RunFolder

logger = logging.getLogger(__name__)

_ABORT_S = 1.0
"""How long processes may take to end that have served nobody yet."""


_LAST_ENDS_S = 15.0
"""For the janitor, the HTTP server, and the controller to take its leave of Redis."""


def stop_within_s(config: BatonConfig) -> float:
    """Any stop of that cluster is over by then: the bounds of all that ``Launcher.stop``
    does one after the other (gateways, workers, Redis, backend)."""
    own = config.gateway.drain_s + 4 * config.cluster.stop_timeout_s
    return own + 3 * PROOF_S + _LAST_ENDS_S


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a cluster is spoken to."""

    gateway_ports: tuple[int, ...]
    controller: socket
    """Listens already; stays its maker's."""
    controller_token: str = field(repr=False)


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
        doors: Doors,
        redis_url: str | None,
        progress: Progress,
        restore_signals: Callable[[], None] = lambda: None,
        modules: Mapping[str, str] = MODULES,
    ) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._restore_signals = restore_signals
        self._secret = credential(CLUSTER_SECRET) or secrets.token_hex(32)
        self._janitor = Janitor(temp_folder)
        self._private = (
            redis_server.prepare(temp_folder, taken=doors.gateway_ports)
            if redis_url is None
            else None
        )
        self._redis_url = redis_url or (self._private.url if self._private else "")
        self._commands = Commands(
            config, folder.config_file, self._secret, self._redis_url, modules
        )
        self._ports = {f"gateway-{i}": port for i, port in enumerate(doors.gateway_ports)}
        self._own = self._processes(self._own_command)
        self._pools: PoolBackend = (
            self._ray_backend(temp_folder)
            if config.cluster.backend == "ray"
            else self._processes(self._commands.worker)
        )
        self._reconciler = Reconciler(on_event=self._on_event)
        self._controller = EmbeddedController(
            config,
            listener=doors.controller,
            token=doors.controller_token,
            redis_url=self._redis_url,
            backend=self._pools,
            on_event=self._on_event,
        )
        self._loop_tasks: list[asyncio.Task[None]] = []
        self._first_death: asyncio.Future[WorkerEvent] | None = None
        self._serving = False

    def _processes(self, command: Callable[[str, str], Command]) -> ProcessesBackend:
        return ProcessesBackend(
            command, log_folder=self._folder.logs, on_started=self._janitor.watch
        )

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

    def _own_command(self, kind: str, name: str) -> Command:
        if kind == "gateway":
            return self._commands.gateway(name, self._ports[name])
        assert self._private is not None
        return Command(self._private.arguments)

    @property
    def gateway_urls(self) -> dict[str, str]:
        """By gateway id."""
        host = self._config.gateway.host
        return {name: url_of(host, port) for name, port in self._ports.items()}

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
        self._loop_tasks = [
            asyncio.create_task(self._reconciler.run(), name="reconciler"),
            asyncio.create_task(self._janitor.keep(), name="keep the janitor"),
        ]
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
        progress = self._progress
        with progress.waiting("waiting for Redis"):
            if self._private is not None:
                self._reconciler.want("redis", ["redis"], self._own)
            await redis_server.wait_answers(self._redis_url, timeout_s=10.0)
            progress.done("Redis answers" if self._private is None else "Redis runs")
            self._reconciler.want("gateway", list(self._ports), self._own)
            await self._controller.start()
            return await wait_ready(self.gateway_urls, self._wanted, progress)

    def _wanted(self) -> Mapping[str, int]:
        """Workers that there should be, by role."""
        roles = Counter({"prefill": 0, "decode": 0})
        for pool in self._controller.sizes().values():
            roles[pool.role] += pool.desired
        return roles

    async def wait_lost(self) -> str:
        """Returns once the cluster cannot be kept up any more, saying why."""
        losses = [
            asyncio.create_task(self._pools.wait_lost()),
            asyncio.create_task(self._controller.wait_lost()),
        ]
        try:
            done, _ = await asyncio.wait(losses, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for loss in losses:
                loss.cancel()

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
        for task in self._loop_tasks:
            task.cancel()
        await asyncio.gather(*self._loop_tasks, return_exceptions=True)
        stop = self._reconciler.stop
        _, killed = await asyncio.gather(
            self._controller.close_api(),
            stop(["gateway"], limit_s=drain_s + limit_s, hurry=hurry),
        )
        killed += await self._controller.stop_workers(limit_s=limit_s, hurry=hurry)
        await self._controller.close()
        # Before its backend closes, which kills what is left.
        killed += await stop(["redis"], limit_s=limit_s, hurry=hurry)
        clean = await self._close_pools(hurry)
        await asyncio.to_thread(self._janitor.finish)
        logger.info("stopped in %.1f s", time.monotonic() - began)
        if killed and self._serving and not hurry.is_set():
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
