"""The backend of Ray: one placement group and one detached actor per worker.

Ray places and starts the processes. What they say to each other, tokens and KV,
never goes through Ray.

Who starts the cluster on one machine (``keep`` False) owns its workers: they die
with it, and what an earlier one of the same name has left is ended. A controller
that stands apart (``keep``) comes and goes: its workers live on without it, and the
next one adopts them. Workers of that name which somebody else may still own are
nobody's to end or to adopt: then nothing is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from baton.config import BatonConfig, PoolConfig
from baton.errors import BatonError, ConfigurationError
from baton.worker.environment import worker_environment
from cluster import ray_calls, ray_cluster
from cluster.procfs import ProcessName, command_of, descendants, wait_gone
from cluster.ray_actor import Place, WorkerSecrets, WorkerStart
from cluster.ray_calls import Actor
from cluster.ray_thread import RayThread
from cluster.ray_worker import RayWorker

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0
"""How long the workers that are left at the end may take to be proved gone, and Ray to
hear of all that are."""

_WITHHELD = frozenset(
    {
        *("BATON_SECRET", "BATON_API_KEY", "BATON_CONTROLLER_TOKEN"),
        *("BATON_ADVERTISE_HOST", "BATON_RUN_DIR", "BATON_STATE_DIR"),
    }
)
"""Of Baton's environment: what workers get elsewise, must not have, or have their own of."""

_CONNECTION_POLL_S = 2.0

_LEAST_CPU = 0.001
"""Ray makes no placement group of nothing."""


def bundle_of(pool: PoolConfig) -> dict[str, float]:
    """What each worker of that pool takes, in Ray's terms: the CPUs and GPUs of all its ranks,
    which are one actor and its children, and the pool's further resources once."""
    num_ranks = pool.parallelism.num_ranks
    each = {"CPU": pool.num_cpus, "GPU": pool.num_gpus}
    wanted = {name: num_ranks * amount for name, amount in each.items()} | pool.resources
    return {name: amount for name, amount in wanted.items() if amount} or {"CPU": _LEAST_CPU}


class RayBackend:
    """Starts workers as actors. ``open`` may run while others start; ``start`` waits.

    Args:
        log_folder: where workers' output goes, on this machine; None leaves it to Ray.
        temp_folder: of a Ray that is started here; needed without a ``ray_address``.
        keep: workers outlive this process, and those of an earlier one are let live.
        on_started: hears of every process on this machine that is ours.
        on_connected: is called once this process is connected: Ray has taken over SIGTERM.
    """

    def __init__(
        self,
        config: BatonConfig,
        *,
        secret: str,
        redis_url: str,
        log_folder: Path | None = None,
        temp_folder: Path | None = None,
        keep: bool = False,
        on_started: Callable[[ProcessName], None] = lambda _: None,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        ours = {key: value for key, value in os.environ.items() if key.startswith("BATON_")}
        defaults = {key: value for key, value in ours.items() if key not in _WITHHELD}
        self._secrets = WorkerSecrets(secret, redis_url, defaults)
        self._log_folder = log_folder
        self._temp_folder = temp_folder
        self._keep = keep
        self._on_started = on_started
        self._on_connected = on_connected
        self._namespace = f"baton-{config.registry.cluster}"
        self._thread = RayThread()
        self._opening: asyncio.Task[None] | None = None
        self._vital: list[ProcessName] = []
        self._workers: list[RayWorker] = []

    async def open(self) -> None:
        """Connects to Ray, once; to a given one anew where that has failed. Raises
        UnavailableError, and ConfigurationError when the cluster's name is taken there."""
        given = self._config.cluster.ray_address is not None
        if self._opening is None or (given and _has_failed(self._opening)):
            self._opening = asyncio.create_task(self._open(), name="open Ray")
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        namespace, address = self._namespace, self._config.cluster.ray_address
        if address is not None:
            await self._thread.call(partial(ray_cluster.connect, address, namespace=namespace))
            await self._end_leftovers(address)
        else:
            assert self._temp_folder is not None, "a Ray of our own needs a folder"
            start = partial(
                ray_cluster.start_local,
                self._temp_folder,
                namespace=namespace,
                resources=ray_cluster.ample(
                    (bundle_of(pool), pool.max_replicas) for pool in self._config.pools.values()
                ),
            )
            await self._thread.call(start)
        self._on_connected()
        if address is None:
            for process in descendants(os.getpid()):
                self._on_started(process)
                if command_of(process) in ("gcs_server", "raylet"):
                    self._vital.append(process)

    async def _end_leftovers(self, address: str) -> None:
        """Ends what a launcher of the same cluster name that has died has left. Raises
        ConfigurationError where somebody else may own workers of that name."""
        found = await self._thread.call(partial(ray_calls.find, self._namespace))
        others = [actor for actor in found if actor.owner is not None or not self._keep]
        taken = [a for a in others if a.owner is None or not a.owner.is_proved_dead]
        if taken:
            raise ConfigurationError(
                _name_is_taken(self._config.registry.cluster, self._namespace, address, taken),
                param="registry.cluster",
            )
        left = [self._known(actor) for actor in others]
        await asyncio.gather(*(worker.kill() for worker in left))
        await asyncio.gather(*(worker.wait() for worker in left))
        if not self._keep:
            await self._thread.call(partial(ray_calls.forget_all_but, self._namespace, set()))

    async def wait_lost(self) -> str:
        """A Ray of our own is lost with its raylet or its GCS: neither can be replaced.
        A given one is lost with the connection to it (Ray Client has then tried for as
        long as it does). What that cluster does about its own is its own matter."""
        await self.open()
        if not self._vital:
            return await self._connection_lost()
        waits = {asyncio.create_task(wait_gone(process)): process for process in self._vital}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()
        self._thread.give_up()
        return f"Ray has died on this machine (pid {waits[done.pop()].pid} is gone)"

    async def _connection_lost(self) -> str:
        address = self._config.cluster.ray_address
        assert address is not None
        while True:
            if ray_cluster.by_client(address) and ray_cluster.is_given_up():
                self._thread.give_up()
                return f"the connection to Ray at {address} was lost"
            await asyncio.sleep(_CONNECTION_POLL_S)

    async def start(self, pool: str, worker_id: str) -> RayWorker:
        config = self._config.for_pool(pool)
        await self.open()
        start = WorkerStart(
            role=config.pools[pool].role,
            pool=pool,
            worker_id=worker_id,
            config=self._config.model_dump(mode="json"),
            environment=_environment(config),
            log_file=str(self._log_folder / f"{worker_id}.log") if self._log_folder else None,
            owner=None if self._keep else Place.here(),
        )
        # A dead actor's name is free only once Ray has noticed: each gets a new one.
        name = f"{self._namespace}/{worker_id}/{uuid.uuid4().hex[:8]}"
        bundle = bundle_of(config.pools[pool])
        creating = self._thread.call(partial(ray_calls.create, name, bundle, start))
        return self._watched(name, creating, needs=_in_words(bundle))

    async def adopt(self) -> Mapping[str, RayWorker]:
        """The workers of this cluster that an earlier controller has left. What is left of
        those that ended meanwhile is cleared away."""
        await self.open()
        if not self._keep:
            return {}
        found = await self._thread.call(partial(ray_calls.find, self._namespace))
        names = {actor.name for actor in found}
        await self._thread.call(partial(ray_calls.forget_all_but, self._namespace, names))
        adopted: dict[str, RayWorker] = {}
        for actor in found:
            worker = self._known(actor)
            if actor.worker_id in adopted:
                logger.error("there are two of %s; killing %s", actor.worker_id, actor.name)
                await worker.kill()
            else:
                adopted[actor.worker_id] = worker
        return adopted

    def _known(self, actor: Actor) -> RayWorker:
        """One that is there already."""
        return self._watched(actor.name, actor, needs="what it asked for")

    def _watched(self, name: str, actor: Actor | Awaitable[Actor], *, needs: str) -> RayWorker:
        worker = RayWorker(
            self._thread,
            name,
            actor,
            secrets=self._secrets,
            needs=needs,
            on_started=self._on_started,
        )
        self._workers = [each for each in self._workers if not each.cleared] + [worker]
        return worker

    async def close(self) -> bool:
        """Waits for an opening that is under way, then leaves or ends Ray. Of a Ray that
        was lost nobody takes leave; the launcher's janitor ends what is left of it. And a
        connecting that hangs is not waited for where workers are kept: none is known yet."""
        if self._opening is None:
            return True
        if self._keep and not self._opening.done():
            return False
        with contextlib.suppress(BatonError):
            if not self._thread.given_up:
                await asyncio.shield(self._opening)
        left = [worker for worker in self._workers if not worker.over]
        if not self._thread.given_up:
            end = RayWorker.leave if self._keep else RayWorker.kill
            await asyncio.gather(*(end(worker) for worker in left))
            await self._wait_cleared()
        await asyncio.gather(*(worker.leave() for worker in self._workers))
        if self._thread.given_up:
            return False
        await self._thread.call(ray_cluster.disconnect)
        return True

    async def _wait_cleared(self) -> None:
        waits = [asyncio.create_task(worker.wait_cleared()) for worker in self._workers]
        if not waits:
            return
        try:
            await asyncio.wait(waits, timeout=_CLOSE_S)
        finally:
            for waiting in waits:
                waiting.cancel()


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _environment(config: BatonConfig) -> dict[str, str]:
    """What libraries must find, and as many OpenMP threads as torch will be given: Ray
    would set them to the actor's ``num_cpus``."""
    own = worker_environment(os.environ)
    threads = config.engine.threads
    return {**own, "OMP_NUM_THREADS": str(threads)} if threads else own


def _in_words(bundle: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _name_is_taken(cluster: str, namespace: str, address: str, actors: list[Actor]) -> str:
    whose = ", ".join(f"{actor.worker_id} ({_owner_in_words(actor.owner)})" for actor in actors)
    end_them = (
        f'python -c "import ray; ray.init({address!r}, namespace={namespace!r}); '
        '[ray.kill(ray.get_actor(name)) for name in ray.util.list_named_actors()]"'
    )
    return (
        f"there are workers of a cluster named {cluster!r} on the Ray at {address} already, and "
        f"nobody has proved that they are left over: {whose}. Choose another name with --cluster "
        f"(registry.cluster); or, if nobody uses them, end them with {end_them}"
    )


def _owner_in_words(owner: Place | None) -> str:
    if owner is None:
        return "of a controller that stands apart"
    if owner.is_local:
        return f"its launcher runs here, pid {owner.process.pid}"
    return "its launcher is on another machine"
