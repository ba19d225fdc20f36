"""The bounded queue in front of the workers."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from baton.errors import DeadlineExceededError, OverloadedError
from baton.telemetry import GatewayMetrics
from router.admission import Admission


def admission(*, max_in_flight: int = 1, max_queued: int = 1) -> Admission:
    metrics = GatewayMetrics(CollectorRegistry())
    return Admission(max_in_flight=max_in_flight, max_queued=max_queued, metrics=metrics)


def later() -> float:
    return asyncio.get_running_loop().time() + 60.0


class Holder:
    """A choice that keeps its place until it is told to leave."""

    def __init__(
        self,
        gate: Admission,
        *,
        deadline: float | None = None,
        priority: int = 0,
        keeps_place: bool = False,
    ) -> None:
        self.admitted = False
        self.priority = priority
        self._leave = asyncio.Event()
        place = gate.admitted(deadline or later(), priority, keeps_place=keeps_place)
        self.task = asyncio.create_task(self._hold(place))

    async def _hold(self, place: AbstractAsyncContextManager[None]) -> None:
        async with place:
            self.admitted = True
            await self._leave.wait()

    @property
    def refusal(self) -> OverloadedError | None:
        """Why it has neither been served nor is waiting; it has been told."""
        error = self.task.exception() if self.task.done() else None
        assert error is None or isinstance(error, OverloadedError)
        return error

    async def leave(self) -> None:
        self._leave.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_are_given_in_order_of_arrival() -> None:
    gate = admission(max_in_flight=2, max_queued=2)
    holders = [Holder(gate) for _ in range(4)]
    await settle()
    assert [holder.admitted for holder in holders] == [True, True, False, False]
    await holders[1].leave()
    await settle()
    assert [holder.admitted for holder in holders] == [True, True, True, False]
    for holder in (holders[0], holders[2], holders[3]):
        await holder.leave()
    assert (gate.num_in_flight, gate.num_queued) == (0, 0)


async def test_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    gate = admission()
    holders = [Holder(gate), Holder(gate)]
    await settle()
    with pytest.raises(OverloadedError) as refused:
        async with gate.admitted(later()):
            pass
    assert refused.value.retry_after_s == 1.0
    for holder in holders:
        await holder.leave()


async def test_retry_after_grows_with_service_times_and_the_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = admission(max_in_flight=2, max_queued=8)
    loop = asyncio.get_running_loop()
    now = loop.time()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", lambda: now)
        async with gate.admitted(now + 60.0):
            now += 10.0
    assert gate.retry_after_s() == 5.0  # one round of two places, each 10 s
    holders = [Holder(gate) for _ in range(5)]
    await settle()
    assert gate.num_queued == 3
    assert gate.retry_after_s() == 20.0
    for holder in holders:
        await holder.leave()


async def test_deadline_in_line_is_raised_and_leaves_the_line() -> None:
    gate = admission()
    first = Holder(gate)
    await settle()
    with pytest.raises(DeadlineExceededError):
        async with gate.admitted(asyncio.get_running_loop().time() + 0.01):
            pass
    assert gate.num_queued == 0
    await first.leave()
    assert gate.num_in_flight == 0


async def test_place_handed_to_a_task_that_is_being_cancelled_goes_to_the_next() -> None:
    gate = admission(max_queued=2)
    first, second, third = Holder(gate), Holder(gate), Holder(gate)
    await settle()
    first._leave.set()
    while first.task in asyncio.all_tasks():
        await asyncio.sleep(0)
        second.task.cancel()
    await settle()
    assert second.task.cancelled()
    assert third.admitted
    await third.leave()
    assert gate.num_in_flight == 0


@settings(max_examples=60, deadline=None)
@given(
    max_in_flight=st.integers(1, 3),
    max_queued=st.integers(0, 3),
    actions=st.lists(st.tuples(st.sampled_from("aaclt"), st.integers(0, 9)), max_size=40),
)
def test_no_place_is_lost_or_doubled_under_any_schedule(
    max_in_flight: int, max_queued: int, actions: list[tuple[str, int]]
) -> None:
    async def scenario() -> None:
        gate = admission(max_in_flight=max_in_flight, max_queued=max_queued)
        holders: list[Holder] = []
        for action, number in actions:
            if action == "a":
                holders.append(Holder(gate, priority=number % 3, keeps_place=number > 7))
            elif holders:
                holder = holders[number % len(holders)]
                if action == "c":
                    holder.task.cancel()
                elif action == "l":
                    holder._leave.set()
            if action == "t":
                await settle()
            holding = sum(h.admitted and not h.task.done() for h in holders)
            assert holding <= gate.num_in_flight <= max_in_flight
            assert gate.num_queued <= max_queued
            assert gate.num_queued == 0 or gate.num_in_flight == max_in_flight
        for holder in holders:
            holder._leave.set()
        results = await asyncio.gather(*(h.task for h in holders), return_exceptions=True)
        allowed = (OverloadedError, asyncio.CancelledError)
        assert all(result is None or isinstance(result, allowed) for result in results)
        assert (gate.num_in_flight, gate.num_queued) == (0, 0)

    asyncio.run(scenario())


async def serve_one(gate: Admission, clock: Clock, service_s: float) -> None:
    """Teaches the gate how long a choice takes."""
    async with gate.admitted(clock.now + 60.0):
        clock.now += service_s


class Clock:
    """In place of the event loop's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now, raising=False)


async def test_choice_that_would_wait_beyond_its_deadline_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    gate = admission(max_in_flight=2, max_queued=100)
    await serve_one(gate, clock, service_s=10.0)
    # Two are served and four wait: the next one's turn comes in 20 s.
    holders = [Holder(gate, deadline=clock.now + 1000.0) for _ in range(6)]
    await settle()
    assert gate.num_queued == 4
    with pytest.raises(OverloadedError, match="about 20 s") as refused:
        async with gate.admitted(clock.now + 19.0):
            pass
    assert refused.value.retry_after_s == 25
    assert gate.num_queued == 4
    patient = Holder(gate, deadline=clock.now + 21.0)
    await settle()
    assert gate.num_queued == 5
    for holder in (*holders, patient):
        await holder.leave()


async def test_nobody_is_refused_early_while_nothing_is_known_or_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    gate = admission(max_in_flight=1, max_queued=100)
    first = [Holder(gate, deadline=clock.now + 1.0) for _ in range(3)]
    await settle()
    assert gate.num_queued == 2  # no choice has ended yet
    for holder in first:
        await holder.leave()
    await serve_one(gate, clock, service_s=1000.0)
    holders = [Holder(gate, deadline=clock.now + 1.0) for _ in range(2)]
    await settle()
    assert gate.num_queued == 1  # the place may come free at any moment
    for holder in holders:
        await holder.leave()


async def full_line(gate: Admission, *priorities: int) -> tuple[Holder, list[Holder]]:
    """Who has the one place, and who waits for it."""
    first = Holder(gate)
    await settle()
    waiting = [Holder(gate, priority=priority) for priority in priorities]
    await settle()
    assert not any(holder.task.done() for holder in waiting)
    return first, waiting


async def order_of_admission(*holders: Holder) -> list[int]:
    """The indices in ``holders`` in the order in which they are given the one place."""
    order: list[int] = []
    while len(order) < len(holders):
        (index,) = [n for n, each in enumerate(holders) if each.admitted and not each.task.done()]
        order.append(index)
        await holders[index].leave()
        await settle()
    return order


async def test_better_priorities_leave_the_line_first_and_equals_in_order_of_arrival() -> None:
    gate = admission(max_queued=8)
    first, waiting = await full_line(gate, 5, 0, 5, -(2**63), 0, 2**63 - 1)
    assert await order_of_admission(first, *waiting) == [0, 4, 2, 5, 1, 3, 6]
    assert (gate.num_in_flight, gate.num_queued) == (0, 0)


async def test_better_priority_takes_no_place_of_who_is_served() -> None:
    gate = admission(max_queued=2)
    first, (waiting,) = await full_line(gate, -5)
    assert first.admitted
    assert not waiting.admitted
    assert await order_of_admission(first, waiting) == [0, 1]


async def test_better_priority_that_finds_the_line_full_puts_the_worst_ones_youngest_out() -> None:
    gate = admission(max_queued=4)
    first, (worst, worse, youngest, same) = await full_line(gate, 9, 5, 9, 1)
    better = Holder(gate, priority=1)
    await settle()
    assert youngest.refusal is not None
    assert "better priority" in youngest.refusal.message
    assert youngest.refusal.retry_after_s == 1.0
    assert gate.num_queued == 4
    order = await order_of_admission(first, worst, worse, same, better)
    assert order == [0, 3, 4, 2, 1]


@pytest.mark.parametrize("priority", [5, 6])
async def test_equal_or_worse_priority_that_finds_the_line_full_is_refused_itself(
    priority: int,
) -> None:
    gate = admission(max_queued=2)
    first, waiting = await full_line(gate, 5, 0)
    late = Holder(gate, priority=priority)
    await settle()
    assert late.refusal is not None
    assert await order_of_admission(first, *waiting) == [0, 2, 1]


async def test_who_keeps_its_place_is_put_out_by_nobody() -> None:
    gate = admission(max_queued=2)
    first, (worse,) = await full_line(gate, 5)
    kept = Holder(gate, priority=9, keeps_place=True)
    await settle()
    better = Holder(gate)
    await settle()
    assert worse.refusal is not None
    same = Holder(gate)
    await settle()
    assert same.refusal is not None, "nobody is left whose place it could take"
    assert await order_of_admission(first, kept, better) == [0, 2, 1]


@pytest.mark.parametrize("put_out_first", [True, False])
async def test_who_leaves_the_line_as_it_is_put_out_costs_nobody_a_place(
    put_out_first: bool,
) -> None:
    gate = admission(max_queued=1)
    first, (worse,) = await full_line(gate, 5)
    better = Holder(gate)
    if put_out_first:
        await asyncio.sleep(0)
        assert gate.num_queued == 1
    worse.task.cancel()
    await settle()
    assert worse.task.cancelled()
    assert await order_of_admission(first, better) == [0, 1]
    assert (gate.num_in_flight, gate.num_queued) == (0, 0)


async def test_foreseen_wait_is_that_behind_equal_and_better_priorities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    gate = admission(max_in_flight=1, max_queued=4)
    await serve_one(gate, clock, service_s=10.0)
    deadline = clock.now + 1000.0
    holders = [Holder(gate, deadline=deadline, priority=p) for p in (0, 5, 5, 0, 5)]
    await settle()
    assert gate.num_queued == 4
    # One of priority 0 is before it, so its turn comes in 10 s; and the line is full.
    hasty = Holder(gate, deadline=clock.now + 9.0)
    await settle()
    assert hasty.refusal is not None
    assert "about 10 s" in hasty.refusal.message
    assert gate.num_queued == 4
    assert not any(holder.task.done() for holder in holders), "it has put somebody out for nothing"
    patient = Holder(gate, deadline=clock.now + 11.0)
    await settle()
    assert patient.refusal is None
    assert holders[4].refusal is not None
    for holder in (holders[0], holders[3], patient, holders[1], holders[2]):
        await holder.leave()
