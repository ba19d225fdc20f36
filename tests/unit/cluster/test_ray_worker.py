"""One worker of Ray's whose Ray comes and goes: the actor is real, in this process."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.inline_actor import InlineActor

from baton.errors import UnavailableError
from cluster import ray_calls
from cluster.backend import Exit
from cluster.procfs import ProcessName, is_alive
from cluster.ray_actor import Place, WorkerSecrets, WorkerStart
from cluster.ray_calls import Actor
from cluster.ray_thread import RayThread
from cluster.ray_worker import RayWorker

SECRETS = WorkerSecrets("the secret", "redis://:password@h")
START = WorkerStart(
    role="prefill", pool="prefill", worker_id="prefill-0", config={}, environment={}
)
NAME = "baton-test/prefill-0/1"


class Ray:
    """What a worker says to Ray itself. ``away``: it raises; ``silent``: it hangs."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.answers = threading.Event()
        self.answers.set()
        self.cleared: list[str] = []
        self.num_told = 0

    def clear_away(self, name: str) -> None:
        self.num_told += 1
        assert self.answers.wait(30)
        if self.away.is_set():
            raise ConnectionError("Ray is away")
        self.cleared.append(name)

    def waits_for_room(self, _name: str) -> bool:
        if self.away.is_set():
            raise ConnectionError("Ray is away")
        return False


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    made = Ray()
    monkeypatch.setattr(ray_calls, "clear_away", made.clear_away)
    monkeypatch.setattr(ray_calls, "waits_for_room", made.waits_for_room)
    monkeypatch.setattr("cluster.ray_worker._RETRY_S", 0.01)
    monkeypatch.setattr("cluster.ray_worker._HEAR_S", 0.05)
    monkeypatch.setattr("cluster.ray_worker._NO_ROOM_S", 0.02)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each worker that has begun was told."""
    seen: list[dict[str, Any]] = []

    async def serve(_config: Any, *, stop: asyncio.Event, **facts: Any) -> None:
        seen.append(facts)
        await stop.wait()

    module = types.ModuleType("prefill_workers.main")
    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prefill_workers.main", module)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return seen


@pytest.fixture
def inline(told: list[dict[str, Any]]) -> Iterator[InlineActor]:
    made = InlineActor(START)
    yield made
    made.close()


def watched(
    inline: InlineActor,
    *,
    thread: RayThread | None = None,
    noted: Place | None = None,
    on_started: Callable[[ProcessName], None] = lambda _: None,
) -> RayWorker:
    """As one that is adopted."""
    actor = Actor(NAME, inline.handle, noted=noted)
    return RayWorker(
        thread or RayThread(),
        NAME,
        actor,
        secrets=SECRETS,
        needs="1 CPU",
        on_started=on_started,
    )


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def end_of(worker: RayWorker) -> Exit:
    async with asyncio.timeout(10):
        return await worker.wait()


def unheard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "Ray is told until it hears" in line]


@pytest.mark.parametrize("how", ["raises", "hangs"])
async def test_place_of_an_unplaced_worker_is_given_back_once_ray_hears_of_it(
    ray: Ray, inline: InlineActor, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    inline.mute.add("place")
    worker = watched(inline)
    if how == "raises":
        ray.away.set()
    else:
        ray.answers.clear()
    await worker.kill()
    assert (await end_of(worker)).reason == "was ended before it had a place"
    await until(lambda: unheard(caplog))
    if how == "raises":
        await until(lambda: ray.num_told > 5)
    assert not worker.cleared
    assert ray.cleared == []
    ray.away.clear()
    ray.answers.set()
    async with asyncio.timeout(10):
        await worker.wait_cleared()
    assert worker.cleared
    assert ray.cleared == [NAME]
    assert len(unheard(caplog)) == 1


async def test_replacement_may_start_while_the_place_of_a_killed_worker_cannot_be_given_back(
    ray: Ray, inline: InlineActor, told: list[Any]
) -> None:
    worker = watched(inline)
    await until(lambda: told)
    ray.away.set()
    await worker.kill()
    assert (await end_of(worker)).reason == "was killed"
    assert not is_alive(inline.place.process)
    await worker.leave()
    assert worker.cleared, "nobody tells Ray any more"
    assert ray.cleared == []


async def test_nobody_tells_a_ray_that_was_given_up(ray: Ray, inline: InlineActor) -> None:
    inline.mute.add("place")
    thread = RayThread()
    worker = watched(inline, thread=thread)
    ray.away.set()
    await worker.kill()
    await end_of(worker)
    await until(lambda: ray.num_told > 1)
    thread.give_up()
    async with asyncio.timeout(10):
        await worker.wait_cleared()


async def test_stop_is_repeated_until_the_worker_has_heard_it(
    ray: Ray, inline: InlineActor, told: list[Any]
) -> None:
    worker = watched(inline)
    await until(lambda: told)
    inline.away.set()
    await worker.stop()
    await until(lambda: inline.num_failed > 2)
    assert not worker.over
    inline.away.clear()
    assert await end_of(worker) == Exit(0, "ended")


async def test_stop_that_is_never_answered_ends_with_the_worker(
    ray: Ray, inline: InlineActor, told: list[Any]
) -> None:
    inline.mute.add("stop")
    worker = watched(inline)
    await until(lambda: told)
    before = asyncio.all_tasks()
    await worker.stop()
    await worker.kill()
    assert (await end_of(worker)).reason == "was killed"
    await worker.wait_cleared()
    await until(lambda: not (asyncio.all_tasks() - before))


async def test_worker_lives_on_while_ray_is_away(
    ray: Ray, inline: InlineActor, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_calls, "END_POLL_S", 0.02)
    worker = watched(inline)
    await until(lambda: told)
    inline.away.set()
    await until(lambda: inline.num_failed > 2)
    inline.away.clear()
    await worker.stop()
    assert (await end_of(worker)).code == 0
    assert len(told) == 1


async def test_worker_that_waits_for_its_place_waits_on_while_ray_is_away(
    ray: Ray, inline: InlineActor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    inline.mute.add("place")
    ray.away.set()
    worker = watched(inline)
    await until(lambda: "does not say where it is" in caplog.text)
    assert not worker.over
    await worker.kill()
    await end_of(worker)


@pytest.mark.parametrize("is_noted", [True, False])
async def test_adopted_worker_that_nobody_has_begun_is_begun_with_what_it_must_know(
    ray: Ray, inline: InlineActor, told: list[dict[str, Any]], is_noted: bool
) -> None:
    worker = watched(inline, noted=inline.place if is_noted else None)
    await until(lambda: told)
    assert told == [
        {"worker_id": "prefill-0", "secret": "the secret", "redis_url": SECRETS.redis_url}
    ]
    assert worker.is_placed
    await worker.stop()
    assert (await end_of(worker)).code == 0


async def test_adopted_worker_that_has_begun_is_not_begun_again(
    ray: Ray, inline: InlineActor, told: list[dict[str, Any]]
) -> None:
    first = watched(inline)
    await until(lambda: told)
    await first.leave()
    assert is_alive(inline.place.process)
    second = watched(inline, noted=inline.place)
    await second.stop()
    assert (await end_of(second)).code == 0
    assert len(told) == 1


async def test_worker_that_gave_up_waiting_to_be_begun_is_told_of_to_whoever_adopts_it(
    ray: Ray, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ray_actor.BEGIN_S", 0.01)
    inline = InlineActor(START)
    try:
        assert inline.ended.wait(10)
        worker = watched(inline, noted=inline.place)
        assert await end_of(worker) == Exit(1, "failed: nobody has begun it within 0.01 s")
        await worker.wait_cleared()
        assert ray.cleared == [NAME], "so its place can be had by others"
        assert told == []
    finally:
        inline.close()


async def test_process_elsewhere_is_asked_about_until_it_is_proved_gone(
    ray: Ray, inline: InlineActor, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Place(ProcessName(1, 0), "another machine", "a node")
    inline.place = elsewhere
    answers = iter(["away", "not yet", "gone"])
    asked: list[Place] = []

    def end_process(_name: str, place: Place) -> Any:
        asked.append(place)
        answer = next(answers)
        if answer == "away":
            raise ConnectionError("Ray is away")
        future = ray_calls.Future()
        future.set_result(answer == "gone")
        return future

    monkeypatch.setattr(ray_calls, "end_process", end_process)
    monkeypatch.setattr(ray_calls, "node_is_dead", lambda _node: False)
    worker = watched(inline, noted=elsewhere)
    await until(lambda: told)
    await worker.kill()
    assert (await end_of(worker)).reason == "was killed"
    assert asked == [elsewhere] * 3


@pytest.mark.parametrize("error", [BrokenPipeError("nobody listens"), UnavailableError("later")])
async def test_worker_that_nobody_could_take_note_of_is_ended_and_proved_gone(
    ray: Ray, inline: InlineActor, told: list[Any], error: Exception
) -> None:
    def refuse(_name: ProcessName) -> None:
        raise error

    worker = watched(inline, on_started=refuse)
    end = await end_of(worker)
    assert end.reason == f"was killed: nobody took note of it: {error}"
    assert not is_alive(inline.place.process)
    assert told == [], "it was begun"
    await worker.wait_cleared()
    assert ray.cleared == [NAME]
