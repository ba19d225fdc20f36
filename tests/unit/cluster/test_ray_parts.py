"""What can be shown of the Ray backend without Ray: the actor's inside, the thread."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.config import PoolConfig
from baton.errors import CheckpointError, ConfigurationError, UnavailableError
from cluster.procfs import ProcessName, is_alive, name_of
from cluster.ray_actor import (
    Place,
    WorkerActor,
    WorkerSecrets,
    WorkerStart,
    _Life,
    machine_id,
)
from cluster.ray_backend import bundle_of
from cluster.ray_calls import _end_here
from cluster.ray_cluster import ample
from cluster.ray_thread import RayThread

SECRETS = WorkerSecrets("the secret", "redis://:password@h", {"BATON_X": "the default"})


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Actors change their process's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        yield


def start_of(tmp_path: Path, **changes: Any) -> WorkerStart:
    start = WorkerStart(
        role="prefill",
        pool="long",
        worker_id="long-0",
        config={
            "pools": {"long": {"role": "prefill", "worker": {"drain_s": 3}}, "decode": {}},
        },
        environment={},
        log_file=None,
        owner=Place(ProcessName(1, 0), "another machine"),
    )
    return replace(start, **changes)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a ``serve`` where the actor looks for its role's."""

    def put(serve: Any) -> None:
        module = types.ModuleType("prefill_workers.main")
        module.serve = serve  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "prefill_workers.main", module)

    return put


def test_actor_has_no_coroutine_so_that_ray_gives_it_threads() -> None:
    assert not [name for name, _ in inspect.getmembers(WorkerActor, inspect.iscoroutinefunction)]


def test_worker_gets_what_the_launcher_gave(tmp_path: Path, standin: Any) -> None:
    seen: dict[str, Any] = {}

    async def serve(config: Any, **arguments: Any) -> None:
        seen.update(arguments, drain_s=config.worker.drain_s)

    standin(serve)
    asyncio.run(_Life(start_of(tmp_path)).run(SECRETS))
    stop = seen.pop("stop")
    assert not stop.is_set()
    assert seen == {
        "worker_id": "long-0",
        "secret": "the secret",
        "redis_url": "redis://:password@h",
        "drain_s": 3,
    }


async def _until_stopped(_config: Any, *, stop: asyncio.Event, **_: Any) -> None:
    await stop.wait()


def test_stop_from_another_thread_ends_the_worker(tmp_path: Path, standin: Any) -> None:
    standin(_until_stopped)
    life = _Life(start_of(tmp_path))
    thread = threading.Thread(target=lambda: asyncio.run(life.run(SECRETS)), daemon=True)
    thread.start()
    life.stop()
    thread.join(10)
    assert not thread.is_alive()
    life.stop()  # after its end: nothing happens


def test_stop_before_the_start_is_not_lost(tmp_path: Path, standin: Any) -> None:
    standin(_until_stopped)
    life = _Life(start_of(tmp_path))
    life.stop()
    asyncio.run(asyncio.wait_for(life.run(SECRETS), 10))


def test_failure_of_the_worker_is_raised(tmp_path: Path, standin: Any) -> None:
    async def serve(_config: Any, **_: Any) -> None:
        raise CheckpointError("weights are missing")

    standin(serve)
    with pytest.raises(CheckpointError, match="weights are missing"):
        asyncio.run(_Life(start_of(tmp_path)).run(SECRETS))


def actor_of(start: WorkerStart, ended: threading.Event) -> WorkerActor:
    return WorkerActor(start, Place.here, after_end=ended.set)


def test_nothing_begins_before_it_is_asked_for_and_then_once(tmp_path: Path, standin: Any) -> None:
    begun: list[str] = []

    async def serve(_config: Any, *, worker_id: str, stop: asyncio.Event, **_: Any) -> None:
        begun.append(worker_id)
        await stop.wait()

    standin(serve)
    ended = threading.Event()
    actor = actor_of(start_of(tmp_path), ended)
    assert Place.from_json(actor.place()) == Place.here()
    assert actor.wait_end(0.05) is None
    assert begun == []
    actor.begin(SECRETS)
    actor.begin(SECRETS)
    assert actor.wait_end(0.05) is None, "it lives, and the call does not wait for its end"
    actor.stop()
    assert actor.wait_end(10) == "null"
    assert actor.wait_end(10) == "null", "whoever asks is told"
    assert ended.wait(10)
    assert begun == ["long-0"]


def test_how_a_life_failed_is_told_to_whoever_asks(tmp_path: Path, standin: Any) -> None:
    async def serve(_config: Any, **_: Any) -> None:
        raise CheckpointError("weights are missing")

    standin(serve)
    ended = threading.Event()
    actor = actor_of(start_of(tmp_path), ended)
    actor.begin(SECRETS)
    assert actor.wait_end(10) == '"weights are missing"'
    assert ended.wait(10)


def test_worker_that_nobody_begins_ends_itself_and_cannot_be_begun_any_more(
    tmp_path: Path, standin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    async def serve(_config: Any, *, worker_id: str, **_: Any) -> None:
        begun.append(worker_id)

    standin(serve)
    monkeypatch.setattr("cluster.ray_actor.BEGIN_S", 0.05)
    ended = threading.Event()
    actor = actor_of(start_of(tmp_path), ended)
    assert ended.wait(10)
    actor.begin(SECRETS)
    assert actor.wait_end(0.05) == '"nobody has begun it within 0.05 s"'
    assert begun == []


def test_worker_that_was_begun_in_time_lives_on(
    tmp_path: Path, standin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin(_until_stopped)
    monkeypatch.setattr("cluster.ray_actor.BEGIN_S", 0.05)
    ended = threading.Event()
    actor = actor_of(start_of(tmp_path), ended)
    actor.begin(SECRETS)
    assert actor.wait_end(0.2) is None
    actor.stop()
    assert actor.wait_end(10) == "null"


def test_pool_that_is_not_of_the_workers_role_is_refused(tmp_path: Path, standin: Any) -> None:
    standin(_until_stopped)
    with pytest.raises(ConfigurationError, match="pool decode is of role decode"):
        asyncio.run(_Life(start_of(tmp_path, pool="decode")).run(SECRETS))


def test_node_has_precedence_over_defaults_and_not_over_what_must_be(
    tmp_path: Path, standin: Any
) -> None:
    os.environ.update(BATON_ADVERTISE_HOST="of the node", OMP_NUM_THREADS="of Ray")
    os.environ.pop("BATON_CACHE", None)
    seen: dict[str, str] = {}

    async def serve(_config: Any, **_: Any) -> None:
        seen.update(os.environ)

    standin(serve)
    actor = actor_of(start_of(tmp_path, environment={"OMP_NUM_THREADS": "1"}), threading.Event())
    ours = {"BATON_ADVERTISE_HOST": "ours", "BATON_CACHE": "ours", "OMP_NUM_THREADS": "ours"}
    actor.begin(replace(SECRETS, defaults=ours))
    assert actor.wait_end(10) == "null"
    names = ("BATON_ADVERTISE_HOST", "BATON_CACHE", "OMP_NUM_THREADS")
    assert [seen[name] for name in names] == ["of the node", "ours", "1"]


def test_bundle_is_all_that_a_pool_asks_for() -> None:
    pool = PoolConfig(role="decode", num_cpus=2, num_gpus=1, resources={"h100_node": 1})
    assert bundle_of(pool) == {"CPU": 2, "GPU": 1, "h100_node": 1}
    assert bundle_of(PoolConfig(role="decode", num_cpus=0)) == {"CPU": 0.001}


def test_bundle_has_cpus_and_gpus_for_every_rank_and_further_resources_once() -> None:
    degrees = {"tensor_parallel_size": 3, "expert_parallel_size": 2}
    pool = PoolConfig(role="decode", num_cpus=0.5, num_gpus=1, resources={"node": 1}, **degrees)
    assert bundle_of(pool) == {"CPU": 3, "GPU": 6, "node": 1}


def test_ray_of_our_own_has_room_for_every_pool_at_its_largest() -> None:
    room = ample([({"CPU": 2.0, "node": 1.0}, 8), ({"CPU": 1.0, "GPU": 1.0}, 3)])
    assert room["CPU"] >= 2 * 8 + 3
    assert (room["node"], room["GPU"]) >= (8, 3)


def test_secrets_are_not_in_the_representation() -> None:
    shown = repr(SECRETS)
    assert not [word for word in ("the secret", "password", "the default") if word in shown]


def test_place_survives_its_way_as_text() -> None:
    place = Place(ProcessName(7, 8), "machine", "node")
    assert Place.from_json(place.to_json()) == place


def test_place_here_is_local_and_elsewhere_is_not() -> None:
    assert Place.here().is_local
    assert Place.here().machine == machine_id()
    assert not Place(ProcessName(1, 0), "another machine").is_local


def test_only_a_process_of_this_machine_is_proved_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Place.here().is_proved_dead
    with subprocess.Popen(["sleep", "60"]) as child:
        process = name_of(child.pid)
        assert process is not None
        assert not Place(process, machine_id()).is_proved_dead
        recycled = ProcessName(process.pid, process.start_time - 1)
        assert Place(recycled, machine_id()).is_proved_dead
        child.kill()
    assert Place(process, machine_id()).is_proved_dead
    assert not Place(process, "another machine").is_proved_dead

    def hidden(_pid: int, _signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", hidden)
    assert not Place(process, machine_id()).is_proved_dead, "another user's, not to be seen"


async def test_ray_thread_runs_calls_in_order_on_one_thread() -> None:
    thread = RayThread()
    idents = await asyncio.gather(*(thread.call(threading.get_ident) for _ in range(5)))
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()


async def test_ray_thread_hands_exceptions_back_and_goes_on() -> None:
    thread = RayThread()

    def fail() -> None:
        raise ValueError("from Ray")

    with pytest.raises(ValueError, match="from Ray"):
        await thread.call(fail)
    assert await thread.call(lambda: 3) == 3


async def test_cancelled_call_that_has_not_begun_is_dropped() -> None:
    thread = RayThread()
    gate = threading.Event()
    ran: list[str] = []
    first = asyncio.create_task(thread.call(lambda: gate.wait(10)))
    second = asyncio.create_task(thread.call(lambda: ran.append("second")))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    gate.set()
    await first
    await thread.call(lambda: ran.append("third"))
    assert ran == ["third"]


async def test_ray_thread_that_was_given_up_refuses_calls() -> None:
    thread = RayThread()
    thread.give_up()
    with pytest.raises(UnavailableError, match="Ray has died"):
        await thread.call(lambda: 3)


def test_task_on_a_node_kills_exactly_that_process_also_when_it_is_stopped() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = name_of(child.pid)
        assert process is not None
        os.kill(child.pid, signal.SIGSTOP)
        assert _end_here(process.pid, process.start_time + 1, machine_id()), "another's pid"
        assert is_alive(process)
        assert _end_here(process.pid, process.start_time, machine_id())
        assert not is_alive(process)


def test_task_that_does_not_see_the_workers_processes_proves_nothing() -> None:
    with pytest.raises(RuntimeError, match="do not see"):
        _end_here(1, 1, "another machine")
