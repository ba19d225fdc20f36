"""The backend of Ray: one placement group and one detached actor per worker.

Ray places and starts the processes. What they say to each other, tokens and KV,
never goes through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.config import BatonConfig
from baton.errors import BatonError
from baton.worker.environment import worker_environment
from cluster import ray_cluster
from cluster.backend import Exit
from cluster.procfs import ProcessName, command_of, descendants, send, wait_gone
from cluster.ray_actor import MAX_CONCURRENCY, Place, WorkerActor, WorkerStart
from cluster.ray_thread import RayThread

logger = logging.getLogger(__name__)

_PROOF_POLL_S = 0.2
"""Between two questions to Ray whether an actor of another machine is dead."""


_TELL_S = 5.0
"""How long Ray may take to hear something that nobody waits for."""


class RayBackend:
    """Starts workers as actors. ``open`` may run while others start; ``start`` waits.

    ``on_started`` hears of every process on this machine that is ours, and
    ``on_connected`` once that this one is connected: Ray has then taken over SIGTERM.
    """

    def __init__(
        self,
        config: BatonConfig,
        *,
        secret: str,
        redis_url: str,
        log_folder: Path,
        temp_folder: Path,
        on_started: Callable[[ProcessName], None] = lambda _: None,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._secret = secret
        self._redis_url = redis_url
        self._log_folder = log_folder
        self._temp_folder = temp_folder
        self._on_started = on_started
        self._on_connected = on_connected
        self._namespace = f"baton-{config.registry.cluster}"
        self._thread = RayThread()
        self._opening: asyncio.Task[None] | None = None
        self._vital: list[ProcessName] = []

    async def open(self) -> None:
        """Connects to Ray, once. Raises UnavailableError."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name="open Ray")
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        namespace, address = self._namespace, self._config.cluster.ray_address
        num_workers = sum(pool.replicas for pool in self._config.pools.values())
        folder = self._temp_folder
        if address is not None:
            await self._thread.call(lambda: ray_cluster.connect(address, namespace=namespace))
        else:
            await self._thread.call(
                lambda: ray_cluster.start_local(
                    folder, namespace=namespace, num_workers=num_workers
                )
            )
        self._on_connected()
        if address is None:
            for process in descendants(os.getpid()):
                self._on_started(process)
                if command_of(process) in ("gcs_server", "raylet"):
                    self._vital.append(process)

    async def wait_lost(self) -> str:
        """A Ray of our own is lost with its raylet or its GCS: neither can be replaced.
        What a given Ray cluster does about its own is its own matter."""
        await self.open()
        if not self._vital:
            await asyncio.Event().wait()
        waits = {asyncio.create_task(wait_gone(process)): process for process in self._vital}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()
        self._thread.give_up()
        return f"Ray has died on this machine (pid {waits[done.pop()].pid} is gone)"

    async def start(self, role: str, worker_id: str) -> RayWorker:
        await self.open()
        start = WorkerStart(
            role=role,
            worker_id=worker_id,
            config=self._config.model_dump(mode="json"),
            secret=self._secret,
            redis_url=self._redis_url,
            environment=self._environment(),
            log_file=str(self._log_folder / f"{worker_id}.log"),
            owner=Place.here(),
        )
        # A dead actor's name is free only once Ray has noticed: each gets a new one.
        name = f"{self._namespace}/{worker_id}/{uuid.uuid4().hex[:8]}"
        return RayWorker(self._thread, name, start, on_started=self._on_started)

    def _environment(self) -> dict[str, str]:
        """Baton's own settings, and as many OpenMP threads as torch will be given:
        Ray would set them to the actor's ``num_cpus``."""
        own = {
            key: value
            for key, value in os.environ.items()
            if key.startswith("BATON_") and key != "BATON_SECRET"
        }
        own |= worker_environment(os.environ)
        threads = self._config.engine.threads
        return {**own, "OMP_NUM_THREADS": str(threads)} if threads else own

    async def close(self) -> bool:
        """Waits for an opening that is under way, then leaves or ends Ray. Of a Ray that
        was lost nobody takes leave; the launcher's janitor ends what is left of it."""
        if self._opening is None:
            return True
        if self._thread.given_up:
            return False
        with contextlib.suppress(BatonError):
            await asyncio.shield(self._opening)
        await self._thread.call(ray_cluster.disconnect)
        return True


class RayWorker:
    """One worker in its actor: from the asking for a place to the proof of its end."""

    def __init__(
        self,
        thread: RayThread,
        name: str,
        start: WorkerStart,
        *,
        on_started: Callable[[ProcessName], None],
    ) -> None:
        self._thread = thread
        self._name = name
        self._on_started = on_started
        self._placed = False
        self._unwanted = False
        self._process: ProcessName | None = None  # on this machine, once it is placed
        self._created = asyncio.create_task(thread.call(lambda: _create(name, start)))

    async def wait(self) -> Exit:
        try:
            actor = await self._created
        except Exception as error:
            return Exit(None, f"could not be created by Ray: {_first_line(error)}")
        try:
            if self._unwanted:
                return Exit(None, "was killed")
            with contextlib.suppress(Exception):  # then running fails too, and says why
                place = await asyncio.wrap_future(actor.place)
                self._placed = True
                if place.is_local:
                    self._process = place.process
                    self._on_started(place.process)
            return await self._wait_end(actor)
        finally:
            await self._end(actor)

    async def _wait_end(self, actor: _Actor) -> Exit:
        run = asyncio.ensure_future(asyncio.wrap_future(actor.run))
        waits: set[asyncio.Future[Any]] = {run}
        if self._process is not None:
            waits.add(asyncio.ensure_future(wait_gone(self._process)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not run.done():
                return Exit(None, "was killed")
            error = run.exception()
            return Exit(0, "ended") if error is None else Exit(1, f"failed: {_first_line(error)}")
        finally:
            for pending in waits:
                pending.cancel()

    async def _end(self, actor: _Actor) -> None:
        """Ends the actor's process, has its end proved, and gives its place back."""
        if self._process is not None:
            send(self._process, signal.SIGKILL)
            await wait_gone(self._process)
        await self._tell_ray(lambda: _kill(actor.handle))
        if self._process is None and self._placed:
            while not await self._thread.call(lambda: _is_dead(actor.handle)):
                logger.debug("%s is not proved dead yet", self._name)
        await self._tell_ray(lambda: _give_back(actor.group))

    async def _tell_ray(self, function: Callable[[], None]) -> None:
        """For what Ray should know; a Ray that has died itself cannot hear it."""
        try:
            await asyncio.wait_for(self._thread.call(function), _TELL_S)
        except Exception as error:  # Ray raises many kinds, documented nowhere
            logger.warning("%s: Ray did not hear of its end: %s", self._name, _first_line(error))

    async def stop(self) -> None:
        """A worker that has not come up yet has nothing to finish: it is killed. So is
        one that Ray cannot be asked to stop."""
        if not self._placed or self._thread.given_up:
            await self.kill()
            return
        actor = await self._created
        await self._tell_ray(lambda: actor.handle.stop.remote())

    async def kill(self) -> None:
        if self._process is not None:
            send(self._process, signal.SIGKILL)
        elif self._created.done():
            actor = await self._created
            await self._tell_ray(lambda: _kill(actor.handle))
        else:  # being created; ``wait`` ends it as soon as that is done
            self._unwanted = True


class _Actor:
    """Ray's objects of one worker, and the futures of its two calls."""

    def __init__(self, group: Any, handle: Any) -> None:
        self.group = group
        self.handle = handle
        self.place = handle.place.remote().future()
        self.run = handle.run.remote().future()


def _create(name: str, start: WorkerStart) -> _Actor:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group(
        [{"CPU": 1}], strategy="STRICT_PACK", name=name, lifetime="detached"
    )
    handle = (
        ray.remote(WorkerActor)
        .options(
            name=name,
            lifetime="detached",
            num_cpus=1,
            max_restarts=0,
            max_concurrency=MAX_CONCURRENCY,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        .remote(start)
    )
    return _Actor(group, handle)


def _kill(handle: Any) -> None:
    import ray

    ray.kill(handle, no_restart=True)


def _is_dead(handle: Any) -> bool:
    """Whether Ray knows the actor to be dead; it then answers any call with that."""
    import ray

    try:
        ray.get(handle.place.remote(), timeout=_PROOF_POLL_S)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.RayError:
        return False
    time.sleep(_PROOF_POLL_S)
    return False


def _give_back(group: Any) -> None:
    import ray

    ray.util.remove_placement_group(group)


def _first_line(error: BaseException) -> str:
    """Ray's exceptions carry whole tracebacks; their cause says it in a line."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]
