"""What can be shown of the Ray backend without Ray: the actor's inside, the thread."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import CheckpointError, UnavailableError
from cluster.procfs import ProcessName
from cluster.ray_actor import Place, WorkerActor, WorkerStart, _Life, machine_id
from cluster.ray_thread import RayThread


def start_of(tmp_path: Path) -> WorkerStart:
    return WorkerStart(
        role="standin",
        worker_id="standin-0",
        config={"gateway": {"port": 1}},
        secret="the secret",
        redis_url="redis://:password@h",
        environment={},
        log_file=str(tmp_path / "standin-0.log"),
        owner=Place(ProcessName(1, 0), "another machine"),
    )


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a ``serve`` where the actor looks for its role's."""

    def put(serve: Any) -> None:
        module = types.ModuleType("standin_workers.main")
        module.serve = serve  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "standin_workers", types.ModuleType("standin_workers"))
        monkeypatch.setitem(sys.modules, "standin_workers.main", module)

    return put


def test_actor_has_no_coroutine_so_that_ray_gives_it_threads() -> None:
    assert not [name for name, _ in inspect.getmembers(WorkerActor, inspect.iscoroutinefunction)]


def test_worker_gets_what_the_launcher_gave(tmp_path: Path, standin: Any) -> None:
    seen: dict[str, Any] = {}

    async def serve(config: Any, **arguments: Any) -> None:
        seen.update(arguments, port_of_gateway=config.gateway.port)

    standin(serve)
    asyncio.run(_Life(start_of(tmp_path)).run())
    stop = seen.pop("stop")
    assert not stop.is_set()
    assert seen == {
        "worker_id": "standin-0",
        "host": "127.0.0.1",
        "port": 0,
        "metrics_port": 0,
        "secret": "the secret",
        "redis_url": "redis://:password@h",
        "port_of_gateway": 1,
    }


async def _until_stopped(_config: Any, *, stop: asyncio.Event, **_: Any) -> None:
    await stop.wait()


def test_stop_from_another_thread_ends_the_worker(tmp_path: Path, standin: Any) -> None:
    standin(_until_stopped)
    life = _Life(start_of(tmp_path))
    thread = threading.Thread(target=lambda: asyncio.run(life.run()), daemon=True)
    thread.start()
    life.stop()
    thread.join(10)
    assert not thread.is_alive()
    life.stop()  # after its end: nothing happens


def test_stop_before_the_start_is_not_lost(tmp_path: Path, standin: Any) -> None:
    standin(_until_stopped)
    life = _Life(start_of(tmp_path))
    life.stop()
    asyncio.run(asyncio.wait_for(life.run(), 10))


def test_failure_of_the_worker_is_raised(tmp_path: Path, standin: Any) -> None:
    async def serve(_config: Any, **_: Any) -> None:
        raise CheckpointError("weights are missing")

    standin(serve)
    with pytest.raises(CheckpointError, match="weights are missing"):
        asyncio.run(_Life(start_of(tmp_path)).run())


def test_secrets_are_not_in_the_representation(tmp_path: Path) -> None:
    shown = repr(start_of(tmp_path))
    assert "the secret" not in shown
    assert "password" not in shown


def test_place_here_is_local_and_elsewhere_is_not() -> None:
    assert Place.here().is_local
    assert Place.here().machine == machine_id()
    assert not Place(ProcessName(1, 0), "another machine").is_local


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
