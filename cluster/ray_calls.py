"""What the backend asks of Ray. All functions block and belong to the Ray thread.

Ray Client offers the same functions; here nothing depends on which of both is used.
An actor and its placement group have one name, ``NAMESPACE/WORKER_ID/RANDOM``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from cluster.procfs import ProcessName, send, wait_gone
from cluster.ray_actor import (
    END_POLL_S,
    MAX_CONCURRENCY,
    Place,
    WorkerActor,
    WorkerSecrets,
    WorkerStart,
)
from cluster.ray_actor import machine_id as this_machine

_PLACES = "baton"
"""Namespace in Ray's store, where every actor notes its place under its name: of a
process that is stopped nothing else would tell us which one it is."""
_OWNERS = "baton-owners"
"""Where a launcher notes itself under the names of its actors, before it asks for them."""

_TASK_PROOF_S = 10.0
"""How long a killed process may take to go, as seen by the task that killed it."""


class Actor:
    """Ray's handle of one worker. ``noted``: where it already was when it was found.
    ``owner``: the launcher it should die with, if there is one."""

    def __init__(
        self, name: str, handle: Any, *, noted: Place | None = None, owner: Place | None = None
    ) -> None:
        self.name = name
        self.noted = noted
        self.owner = owner
        self._handle = handle

    @property
    def worker_id(self) -> str:
        return self.name.split("/")[1]

    def place(self) -> Future[str]:
        """Done once it is placed; fails when it cannot be any more."""
        future: Future[str] = self._handle.place.remote().future()
        return future

    def begin(self, secrets: WorkerSecrets) -> Future[None]:
        future: Future[None] = self._handle.begin.remote(secrets).future()
        return future

    def wait_end(self) -> Future[str | None]:
        future: Future[str | None] = self._handle.wait_end.remote(END_POLL_S).future()
        return future

    def stop(self) -> Future[None]:
        future: Future[None] = self._handle.stop.remote().future()
        return future


def _note_place(name: str) -> Place:
    """In the actor: which process it is, said to Ray's store."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    place = Place.here(ray.get_runtime_context().get_node_id())
    _internal_kv_put(name, place.to_json(), namespace=_PLACES)
    return place


def create(name: str, bundle: Mapping[str, float], start: WorkerStart) -> Actor:
    """Asks Ray for a worker in a bundle of its own, all of which it takes."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if start.owner is not None:
        _internal_kv_put(name, start.owner.to_json(), namespace=_OWNERS)
    group = ray.util.placement_group(
        [dict(bundle)], strategy="STRICT_PACK", name=name, lifetime="detached"
    )
    further = dict(bundle)
    handle = (
        ray.remote(WorkerActor)
        .options(
            name=name,
            lifetime="detached",
            num_cpus=further.pop("CPU", 0),
            num_gpus=further.pop("GPU", 0),
            resources=further,
            max_restarts=0,
            max_concurrency=MAX_CONCURRENCY,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        .remote(start, functools.partial(_note_place, name))
    )
    return Actor(name, handle)


def find(namespace: str) -> list[Actor]:
    """The workers of this namespace that live or wait for their place."""
    import ray

    found = []
    for name in ray.util.list_named_actors():
        if name.startswith(f"{namespace}/") and name.count("/") == 2:
            handle = _handle_of(name)
            if handle is not None:
                noted, owner = _noted(name, _PLACES), _noted(name, _OWNERS)
                found.append(Actor(name, handle, noted=noted, owner=owner))
    return found


def _handle_of(name: str) -> Any | None:
    """Ray's handle of the actor of that name; None when it is no more. Raises what Ray
    raises when it does not answer."""
    import ray

    try:
        return ray.get_actor(name)
    except ValueError:  # that it has ended, or that the GCS does not answer
        if name in ray.util.list_named_actors():
            raise
        return None


def _noted(name: str, namespace: str) -> Place | None:
    """A place of an actor's: None when it never came to one; of its owner's: if it has none."""
    from ray.experimental.internal_kv import _internal_kv_get

    noted = _internal_kv_get(name, namespace=namespace)
    return Place.from_json(noted) if noted else None


def forget_all_but(namespace: str, names: set[str]) -> None:
    """Removes placement groups and notes of actors that are no more. What a launcher that
    lives on this machine is about to use stays."""
    from ray.experimental.internal_kv import _internal_kv_list

    left = {group["name"] for group in _groups()}
    for store in (_PLACES, _OWNERS):
        keys = _internal_kv_list(f"{namespace}/", namespace=store)
        left |= {key.decode() for key in keys}
    for name in left:
        if name.startswith(f"{namespace}/") and name not in names:
            owner = _noted(name, _OWNERS)
            if owner is None or not owner.is_local or owner.is_proved_dead:
                clear_away(name)


def _groups() -> list[dict[str, Any]]:
    """The placement groups that there are, also those that wait for a place."""
    import ray

    table = ray.util.placement_group_table().values()
    return [group for group in table if group["state"] != "REMOVED"]


def clear_away(name: str) -> None:
    """Has Ray end the actor of that name, gives its placement group back, and forgets what
    was noted of it; each if it is there."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_del

    _kill(name)
    with contextlib.suppress(ValueError):
        ray.util.remove_placement_group(ray.util.get_placement_group(name))
    for store in (_PLACES, _OWNERS):
        _internal_kv_del(name, namespace=store)


def _kill(name: str) -> None:
    import ray

    handle = _handle_of(name)
    if handle is not None:
        ray.kill(handle, no_restart=True)


def waits_for_room(name: str) -> bool:
    """Whether its placement group has no place yet."""
    waiting = ("PENDING", "RESCHEDULING")
    return any(group["name"] == name and group["state"] in waiting for group in _groups())


def end_process(name: str, place: Place) -> Future[bool]:
    """Kills that actor's process on its own node, also when it is stopped; True: it is gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _kill(name)
    task = ray.remote(_end_here).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
    )
    process = place.process
    future: Future[bool] = task.remote(process.pid, process.start_time, place.machine).future()
    return future


def _end_here(pid: int, start_time: int, machine: str) -> bool:
    """On the process's node. Raises RuntimeError where its pid means another process."""
    if machine != this_machine():
        raise RuntimeError("Ray's tasks on that node do not see its actors' processes")
    process = ProcessName(pid, start_time)
    send(process, signal.SIGKILL)
    try:
        asyncio.run(asyncio.wait_for(wait_gone(process), _TASK_PROOF_S))
    except TimeoutError:
        return False
    return True


def node_is_dead(node_id: str) -> bool:
    """Whether Ray has found that node dead; one that it does not know is."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return not any(node["NodeID"] == node_id and node["Alive"] for node in nodes)


def says_dead(error: BaseException) -> bool:
    """Whether it is Ray's word that an actor has ended, or can never start. Anything else
    (a connection that was lost, a head that restarts) says nothing about the actor."""
    from ray import exceptions

    if isinstance(error, exceptions.ActorUnavailableError):
        return False
    dead = (exceptions.RayActorError, exceptions.ActorUnschedulableError, exceptions.RayTaskError)
    return isinstance(error, dead)


def first_line(error: BaseException) -> str:
    """Ray's exceptions carry whole tracebacks; their cause says it in a line."""
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[0]
