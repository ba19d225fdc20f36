"""Of the Ray backend: what it hands to Ray, and whose workers it may end or adopt."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
from support.inline_actor import InlineActor

from baton.config import parse_config
from baton.errors import ConfigurationError
from cluster import ray_calls, ray_cluster
from cluster.procfs import name_of
from cluster.ray_actor import Place, machine_id
from cluster.ray_backend import RayBackend

NAMESPACE = "baton-mine"
ADDRESS = "ray://h:10001"


@dataclass
class FakeRay:
    """As much of Ray as the backend uses: named actors, groups, a store. Nothing is placed;
    what is handed over is pickled and kept."""

    actors: dict[str, InlineActor] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    store: dict[tuple[str, str], str] = field(default_factory=dict)
    handed: list[bytes] = field(default_factory=list)
    lookups_fail: bool = False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        import ray  # not before a test runs: see tests/conftest.py
        from ray.experimental import internal_kv

        patch.setattr(ray_cluster, "connect", lambda *_, **__: None)
        patch.setattr(ray_cluster, "disconnect", lambda: None)
        patch.setattr(ray, "get_actor", self.get_actor)
        patch.setattr(ray, "kill", self.kill)
        patch.setattr(ray, "remote", lambda _cls: types.SimpleNamespace(options=self.options))
        util = ray.util
        patch.setattr(util, "list_named_actors", lambda: list(self.actors))
        patch.setattr(util, "placement_group", self.placement_group)
        patch.setattr(util, "get_placement_group", self.get_group)
        patch.setattr(util, "remove_placement_group", lambda name: self.groups.pop(name))
        patch.setattr(util, "placement_group_table", self.table)
        patch.setattr(internal_kv, "_internal_kv_put", self.put)
        patch.setattr(internal_kv, "_internal_kv_get", self.get)
        patch.setattr(internal_kv, "_internal_kv_list", self.keys)
        patch.setattr(internal_kv, "_internal_kv_del", self.delete)

    def get_actor(self, name: str) -> Any:
        if name not in self.actors or self.lookups_fail:
            raise ValueError(f"Failed to look up actor {name}")
        return self.actors[name].handle

    def kill(self, handle: Any, *, no_restart: bool) -> None:
        assert no_restart
        (name,) = [name for name, actor in self.actors.items() if actor is handle._actor]
        self.actors.pop(name).close()

    def options(self, *, name: str, **options: Any) -> Any:
        def create(start: Any, note: Any) -> Any:
            from ray import cloudpickle

            self.handed.append(cloudpickle.dumps((name, options, start, note)))
            self.actors[name] = InlineActor(start)
            return self.actors[name].handle

        return types.SimpleNamespace(remote=create)

    def placement_group(self, _bundles: Any, *, name: str, **_: Any) -> str:
        self.groups[name] = "CREATED"
        return name

    def get_group(self, name: str) -> str:
        if name not in self.groups:
            raise ValueError(f"Failed to look up placement group {name}")
        return name

    def table(self) -> dict[str, dict[str, str]]:
        return {name: {"name": name, "state": state} for name, state in self.groups.items()}

    def put(self, key: str, value: str, *, namespace: str) -> None:
        self.handed.append(value.encode())
        self.store[namespace, key] = value

    def get(self, key: str, *, namespace: str) -> bytes | None:
        value = self.store.get((namespace, key))
        return value.encode() if value is not None else None

    def keys(self, prefix: str, *, namespace: str) -> list[bytes]:
        own = [key for space, key in self.store if space == namespace]
        return [key.encode() for key in own if key.startswith(prefix)]

    def delete(self, key: str, *, namespace: str) -> None:
        self.store.pop((namespace, key), None)

    def add(self, worker_id: str, owner: Place | None) -> str:
        """A worker that somebody has started."""
        name = f"{NAMESPACE}/{worker_id}/1"
        start = ray_calls.WorkerStart("prefill", "prefill", worker_id, {}, {}, owner=owner)
        ray_calls.create(name, {"CPU": 1.0}, start)
        return name


def backend_of(*, keep: bool) -> RayBackend:
    config = parse_config({"registry": {"cluster": "mine"}, "cluster": {"ray_address": ADDRESS}})
    return RayBackend(config, secret="the secret", redis_url="redis://:password@h", keep=keep)


@pytest_asyncio.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeRay]:
    made = FakeRay()
    made.install(monkeypatch)
    monkeypatch.setattr(os, "environ", {**os.environ, "BATON_X_TOKEN": "of an operator"})
    yield made
    for actor in made.actors.values():
        actor.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    async def serve(_config: Any, *, stop: asyncio.Event, **facts: Any) -> None:
        seen.append({**facts, "token": os.environ.get("BATON_X_TOKEN")})
        await stop.wait()

    module = types.ModuleType("prefill_workers.main")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefill_workers.main", module)
    return seen


def dead() -> Place:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = name_of(child.pid)
        assert process is not None
        child.kill()
    return Place(process, machine_id())


async def test_no_secret_is_in_what_ray_stores_and_the_worker_knows_all(
    fake: FakeRay, told: list[dict[str, Any]]
) -> None:
    backend = backend_of(keep=True)
    worker = await backend.start("prefill", "prefill-0")
    os.environ.pop("BATON_X_TOKEN")
    async with asyncio.timeout(10):
        while not told:
            await asyncio.sleep(0.01)
    assert told == [
        {
            "worker_id": "prefill-0",
            "secret": "the secret",
            "redis_url": "redis://:password@h",
            "token": "of an operator",
        }
    ]
    handed = b"".join(fake.handed)
    assert b"prefill-0" in handed
    for secret in (b"the secret", b"password", b"of an operator"):
        assert secret not in handed
    await worker.stop()
    assert (await worker.wait()).code == 0
    assert await backend.close()


async def test_launcher_ends_what_a_dead_one_has_left(fake: FakeRay) -> None:
    fake.add("prefill-0", dead())
    fake.placement_group([], name=f"{NAMESPACE}/prefill-1/2")
    backend = backend_of(keep=False)
    await backend.open()
    assert await backend.adopt() == {}
    assert await backend.close()
    assert (fake.actors, fake.groups, fake.store) == ({}, {}, {})


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("owner", "who"),
    [
        (Place.here(), f"prefill-0 (its launcher runs here, pid {os.getpid()})"),
        (Place(Place.here().process, "another machine"), "launcher is on another machine"),
        (None, "prefill-0 (of a controller that stands apart)"),
    ],
    ids=["lives", "elsewhere", "none"],
)
async def test_workers_that_somebody_else_may_own_are_neither_ended_nor_adopted(
    fake: FakeRay, told: list[Any], owner: Place | None, who: str, keep: bool
) -> None:
    name = fake.add("prefill-0", owner)
    fake.add("prefill-1", dead())
    backend = backend_of(keep=keep)
    if keep and owner is None:
        assert list(await backend.adopt()) == ["prefill-0"]
    else:
        with pytest.raises(ConfigurationError) as refusal:
            await backend.adopt()
        for part in (who, ADDRESS, "--cluster", f"namespace='{NAMESPACE}'"):
            assert part in refusal.value.message
    assert await backend.close()
    assert name in fake.actors
    assert name in fake.groups


async def test_place_that_a_living_launcher_is_about_to_use_is_not_given_back(
    fake: FakeRay,
) -> None:
    name = fake.add("prefill-0", Place.here())
    fake.actors.pop(name).close()  # Ray has the group, and not yet the actor
    backend = backend_of(keep=False)
    await backend.open()
    assert name in fake.groups
    assert await backend.close()


async def test_worker_that_ray_cannot_look_up_just_now_is_not_taken_for_one_that_ended(
    fake: FakeRay,
) -> None:
    name = fake.add("prefill-0", None)
    fake.lookups_fail = True
    with pytest.raises(ValueError, match="look up"):
        await backend_of(keep=True).adopt()
    with pytest.raises(ValueError, match="look up"):
        ray_calls.clear_away(name)
    assert name in fake.groups


async def test_close_waits_a_bounded_time_for_ray_to_hear_of_what_has_ended(
    fake: FakeRay, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ray_worker._RETRY_S", 0.01)
    monkeypatch.setattr("cluster.ray_backend._CLOSE_S", 0.3)
    backend = backend_of(keep=True)
    worker = await backend.start("prefill", "prefill-0")
    while not worker.is_placed:
        await asyncio.sleep(0.01)
    fake.lookups_fail = True
    await worker.kill()
    await worker.wait()
    closing = asyncio.create_task(backend.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    fake.lookups_fail = False
    assert await asyncio.wait_for(closing, 10)
    assert fake.groups == {}

    deaf = backend_of(keep=True)
    worker = await deaf.start("prefill", "prefill-1")
    while not worker.is_placed:
        await asyncio.sleep(0.01)
    fake.lookups_fail = True
    await worker.kill()
    await worker.wait()
    assert await asyncio.wait_for(deaf.close(), 10)
    assert len(fake.groups) == 1
