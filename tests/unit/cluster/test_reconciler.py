"""The reconciler over a fake backend and a fake clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_pools import FakeBackend, FakeClock, FakeProcess

from baton.errors import UnavailableError
from cluster.reconciler import PROOF_S, Reconciler
from cluster.slots import MAX_DELAY_S, STABLE_S, WorkerEvent, backoff_s


class Rig:
    def __init__(self, *, told_who_serves: bool = False) -> None:
        self.clock = FakeClock()
        self.backend = FakeBackend()
        self.events: list[WorkerEvent] = []
        self.reconciler = Reconciler(
            clock=self.clock, on_event=self.events.append, told_who_serves=told_who_serves
        )

    async def settle(self) -> float | None:
        """One pass, and everything that follows from it without time passing."""
        due = self.reconciler.reconcile()
        for _ in range(10):
            await asyncio.sleep(0)
        return due

    async def advance(self, seconds: float) -> float | None:
        self.clock.now += seconds
        return await self.settle()

    def deaths(self) -> list[float]:
        return [event.retry_in_s for event in self.events if event.kind == "died"]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    hurry = asyncio.Event()
    hurry.set()
    await rig.reconciler.stop(["prefill", "decode"], limit_s=0, hurry=hurry)


async def test_every_wanted_worker_is_started_once(rig: Rig) -> None:
    rig.reconciler.want("prefill", ["prefill-0"], rig.backend)
    rig.reconciler.want("decode", ["decode-0", "decode-1"], rig.backend)
    await rig.settle()
    await rig.settle()
    assert sorted(rig.backend.ids()) == ["decode-0", "decode-1", "prefill-0"]
    assert rig.reconciler.running() == {
        "prefill-0": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
    }


async def test_nothing_is_started_while_that_is_not_allowed(rig: Rig) -> None:
    allowed = False
    rig.reconciler = Reconciler(clock=rig.clock, may_start=lambda: allowed)
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    assert (await rig.settle() or 0) > 0, "it is to be asked again"
    assert rig.backend.ids() == []
    allowed = True
    await rig.advance(1.0)
    assert rig.backend.ids() == ["decode-0"]


async def test_worker_that_lived_long_is_replaced_at_once_under_its_name(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    rig.clock.now += STABLE_S
    rig.backend.started[0].die()
    await rig.settle()
    await rig.settle()
    assert rig.backend.ids() == ["decode-0", "decode-0"]
    assert rig.deaths() == [0.0]


async def test_replacement_waits_for_the_proof_of_death(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    await rig.advance(1000)
    assert len(rig.backend.started) == 1


async def test_quick_deaths_are_replaced_later_and_later(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    for _ in range(9):
        await rig.settle()
        rig.backend.started[-1].die()
        await rig.settle()
        rig.clock.now += rig.deaths()[-1] - 0.01
        count = len(rig.backend.started)
        due = await rig.settle()
        assert due == pytest.approx(0.01)
        assert len(rig.backend.started) == count, "started before it was due"
        rig.clock.now += 0.02
    assert rig.deaths() == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


async def test_long_life_forgives_earlier_quick_deaths(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    for lived_s in (0.0, 0.0, STABLE_S, 0.0):
        await rig.settle()
        rig.clock.now += lived_s
        rig.backend.started[-1].die()
        await rig.settle()
        rig.clock.now += MAX_DELAY_S
    assert rig.deaths() == [0.5, 1.0, 0.0, 0.5]


async def test_worker_that_dies_on_its_long_way_to_serve_is_replaced_later_and_later() -> None:
    rig = Rig(told_who_serves=True)
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    for _ in range(4):
        await rig.settle()
        rig.clock.now += 10 * STABLE_S
        rig.backend.started[-1].die()
        await rig.settle()
        rig.clock.now += MAX_DELAY_S
    assert rig.deaths() == [0.5, 1.0, 2.0, 4.0]


async def test_worker_is_stable_once_it_has_served_for_a_while() -> None:
    rig = Rig(told_who_serves=True)
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    for served_s in (STABLE_S - 1, STABLE_S, 0.0):
        await rig.settle()
        await rig.advance(10 * STABLE_S)
        rig.reconciler.serves("decode-0")
        rig.clock.now += served_s
        rig.reconciler.serves("decode-0")  # told again and again: it serves since the first
        rig.backend.started[-1].die()
        await rig.settle()
        rig.clock.now += MAX_DELAY_S
    assert rig.deaths() == [0.5, 0.0, 0.5]


async def test_death_of_one_worker_leaves_the_others_alone(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0", "decode-1"], rig.backend)
    await rig.settle()
    rig.backend.started[0].die()
    await rig.advance(1.0)
    await rig.advance(1.0)
    assert rig.backend.ids() == ["decode-0", "decode-1", "decode-0"]
    assert not rig.backend.started[1].end.done()


@pytest.mark.parametrize("error", [UnavailableError("no room"), ValueError("a fault")])
async def test_failed_start_counts_as_a_death_and_is_tried_again(
    rig: Rig, error: Exception
) -> None:
    rig.backend.refuse = error
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    assert [(event.kind, str(error) in event.reason) for event in rig.events] == [("died", True)]
    rig.backend.refuse = None
    await rig.advance(1.0)
    assert rig.backend.ids() == ["decode-0"]


async def test_running_loop_replaces_a_dead_worker_by_itself() -> None:
    backend = FakeBackend()
    clock = FakeClock()
    reconciler = Reconciler(clock=clock)
    reconciler.want("decode", ["decode-0"], backend)
    loop_task = asyncio.create_task(reconciler.run())
    while not backend.started:
        await asyncio.sleep(0)
    clock.now += STABLE_S
    backend.started[0].die()
    while len(backend.started) < 2:
        await asyncio.sleep(0)
    loop_task.cancel()
    await reconciler.stop(["decode"], limit_s=1, hurry=asyncio.Event())


async def test_stop_asks_first_and_starts_nothing_again(rig: Rig) -> None:
    rig.reconciler.want("prefill", ["prefill-0"], rig.backend)
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    killed = await rig.reconciler.stop(["decode"], limit_s=60, hurry=asyncio.Event())
    await rig.advance(100)
    assert killed == 0
    assert rig.reconciler.running() == {"prefill-0": "prefill"}
    assert [(e.kind, e.worker_id) for e in rig.events][-1] == ("stopped", "decode-0")


async def test_worker_that_does_not_heed_stop_is_killed_after_its_limit(rig: Rig) -> None:
    rig.backend.heeds_stop = False
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    assert await rig.reconciler.stop(["decode"], limit_s=0.01, hurry=asyncio.Event()) == 1
    assert rig.backend.started[0].stop_asked
    assert rig.backend.started[0].killed


async def test_hurry_ends_the_waiting_for_a_drain(rig: Rig) -> None:
    rig.backend.heeds_stop = False
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    hurry = asyncio.Event()
    stopping = asyncio.create_task(rig.reconciler.stop(["decode"], limit_s=3600, hurry=hurry))
    await asyncio.sleep(0)
    assert not stopping.done()
    hurry.set()
    assert await stopping == 1


async def test_stop_of_a_worker_whose_start_hangs_ends(rig: Rig) -> None:
    rig.backend.gate = asyncio.Event()
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    assert await rig.reconciler.stop(["decode"], limit_s=0.01, hurry=asyncio.Event()) == 0
    assert rig.backend.started == []


async def test_worker_that_comes_up_while_it_is_stopped_is_stopped(rig: Rig) -> None:
    rig.backend.gate = asyncio.Event()
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    stop = rig.reconciler.stop(["decode"], limit_s=3600, hurry=asyncio.Event())
    stopping = asyncio.create_task(stop)
    await asyncio.sleep(0)
    rig.backend.gate.set()
    assert await stopping == 0
    assert rig.backend.started[0].stop_asked


@given(st.integers(min_value=1, max_value=10_000))
def test_backoff_grows_to_its_bound_and_stays(quick_deaths: int) -> None:
    assert 0 < backoff_s(quick_deaths) <= MAX_DELAY_S
    assert backoff_s(quick_deaths) <= backoff_s(quick_deaths + 1)


async def test_retired_worker_is_asked_and_its_slot_goes_once_it_is_gone(rig: Rig) -> None:
    rig.backend.heeds_stop = False
    rig.reconciler.want("decode", ["decode-0", "decode-1"], rig.backend)
    await rig.settle()
    rig.reconciler.retire("decode-1", limit_s=30)
    due = await rig.settle()
    assert due == pytest.approx(30)
    process = rig.backend.started[1]
    assert process.stop_asked
    assert {s.worker_id: s.leaving for s in rig.reconciler.slots()} == {
        "decode-0": False,
        "decode-1": True,
    }
    process.die(0, "ended")
    await rig.settle()
    await rig.advance(1000)
    assert [slot.worker_id for slot in rig.reconciler.slots()] == ["decode-0"]
    assert rig.backend.ids() == ["decode-0", "decode-1"], "it was started again"
    assert not process.killed
    assert not rig.backend.started[0].stop_asked


async def test_retired_worker_is_killed_when_its_bound_is_over(rig: Rig) -> None:
    rig.backend.heeds_stop = False
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    rig.reconciler.retire("decode-0", limit_s=30)
    await rig.advance(29.9)
    assert not rig.backend.started[0].killed
    await rig.advance(0.2)
    assert rig.backend.started[0].killed
    assert rig.reconciler.slots() == []
    assert rig.deaths() == []


async def test_worker_that_survives_being_killed_is_killed_again(rig: Rig) -> None:
    rig.backend.heeds_stop = rig.backend.heeds_kill = False
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    process = rig.backend.started[0]
    rig.reconciler.retire("decode-0", limit_s=30)
    await rig.advance(31)
    assert process.num_kills == 1
    await rig.advance(PROOF_S)
    assert process.num_kills == 2
    assert [slot.worker_id for slot in rig.reconciler.slots()] == ["decode-0"], "not proved gone"
    process.die()


async def test_worker_that_waits_for_its_retry_simply_goes(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    rig.backend.started[0].die()
    await rig.settle()
    rig.reconciler.retire("decode-0", limit_s=30)
    assert rig.reconciler.slots() == []
    await rig.advance(1000)
    assert rig.backend.ids() == ["decode-0"]


async def test_worker_that_has_not_been_started_simply_goes(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    rig.reconciler.retire("decode-0", limit_s=30)
    await rig.settle()
    assert rig.reconciler.slots() == []
    assert rig.backend.started == []


async def test_retired_worker_whose_start_hangs_goes_when_its_bound_is_over(rig: Rig) -> None:
    rig.backend.gate = asyncio.Event()
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    rig.reconciler.retire("decode-0", limit_s=30)
    await rig.advance(1)
    assert [slot.leaving for slot in rig.reconciler.slots()] == [True]
    await rig.advance(30)
    assert rig.reconciler.slots() == []
    assert rig.backend.started == []


async def test_killed_worker_is_replaced_like_a_dead_one_and_the_event_says_why(rig: Rig) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    await rig.advance(STABLE_S)
    rig.reconciler.kill("decode-0", "fenced", "lost its registration")
    await rig.settle()
    await rig.settle()
    assert rig.backend.ids() == ["decode-0", "decode-0"]
    event = next(event for event in rig.events if event.kind == "died")
    assert (event.cause, event.reason) == ("fenced", "was killed: it lost its registration")
    await rig.advance(STABLE_S)
    rig.backend.started[1].die()
    await rig.settle()
    last = [event for event in rig.events if event.kind == "died"][-1]
    assert (last.cause, last.reason) == ("died", "exited with status 1")


async def test_start_that_takes_too_long_is_tried_again_later_and_later() -> None:
    rig = Rig(told_who_serves=True)
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    for _ in range(3):
        await rig.settle()
        await rig.advance(STABLE_S)
        rig.reconciler.kill("decode-0", "start_timeout", "has not registered")
        await rig.settle()
        rig.clock.now += MAX_DELAY_S
    assert rig.deaths() == [0.5, 1.0, 2.0]


async def test_adopted_worker_fills_its_slot_and_is_replaced_when_it_dies(rig: Rig) -> None:
    process = FakeProcess("decode-3")
    rig.reconciler.adopt("decode", "decode-3", process, rig.backend)
    await rig.settle()
    assert rig.reconciler.slots()[0].adopted
    assert rig.backend.started == []
    await rig.advance(STABLE_S)
    process.die()
    await rig.settle()
    await rig.settle()
    assert rig.backend.ids() == ["decode-3"]
    assert not rig.reconciler.slots()[0].adopted


async def test_stop_ends_also_workers_that_are_just_leaving(rig: Rig) -> None:
    rig.backend.heeds_stop = False
    rig.reconciler.want("decode", ["decode-0", "decode-1"], rig.backend)
    await rig.settle()
    rig.reconciler.retire("decode-1", limit_s=3600)
    assert await rig.reconciler.stop(["decode"], limit_s=0.01, hurry=asyncio.Event()) == 2
    assert rig.reconciler.slots() == []


async def test_running_loop_kills_by_itself_what_overstays() -> None:
    backend, clock = FakeBackend(), FakeClock()
    backend.heeds_stop = False
    reconciler = Reconciler(clock=clock)
    reconciler.want("decode", ["decode-0"], backend)
    loop_task = asyncio.create_task(reconciler.run())
    while not backend.started:
        await asyncio.sleep(0)
    reconciler.retire("decode-0", limit_s=0.01)
    clock.now += 1
    while reconciler.slots():
        await asyncio.sleep(0)
    loop_task.cancel()
    assert backend.started[0].killed


async def test_process_that_cannot_be_watched_is_killed_before_another_takes_its_place(
    rig: Rig,
) -> None:
    rig.reconciler.want("decode", ["decode-0"], rig.backend)
    await rig.settle()
    unwatched = rig.backend.started[0]
    unwatched.end.set_exception(OSError("too many open files"))
    await rig.settle()
    assert [event.reason for event in rig.events if event.kind == "died"] == [
        "could not be watched: too many open files"
    ]
    assert unwatched.killed
    await rig.advance(1.0)
    assert rig.backend.ids() == ["decode-0", "decode-0"]
