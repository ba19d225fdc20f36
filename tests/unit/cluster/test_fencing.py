"""Who is killed for having vanished from the registry, and who is not."""

from __future__ import annotations

import pytest
from support.fake_pools import FakeProcess

from cluster.controller_store import Registered, RegistryRead
from cluster.fencing import Fencing, Verdict
from cluster.slots import SlotView

FENCE_S, START_S, TTL_S, DRAIN_S = 5.0, 120.0, 5.0, 45.0
STEP_S = 0.25


class Rig:
    """One worker, and a Redis that is asked every ``STEP_S`` seconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.server = "redis-1"
        self.up = True
        self.left: Registered | None = None
        self.leaving = self.adopted = False
        self.served: frozenset[str] = frozenset()
        self.fencing = Fencing(
            fence_s=FENCE_S, start_timeout_s=START_S, ttl_s=TTL_S, drain_limit_s=lambda _: DRAIN_S
        )
        self.start()

    def start(self) -> None:
        """Another process in the same slot."""
        self.process: FakeProcess | None = FakeProcess("decode-0")
        self.started_at = self.now

    def beat(self, epoch: str = "a") -> None:
        self.left = Registered(epoch, TTL_S)

    def deregister(self) -> None:
        self.left = None

    def look(self) -> list[Verdict]:
        if not self.up:
            self.fencing.unanswered()
            return []
        workers = {"decode-0": self.left} if self.left is not None else {}
        slot = SlotView(
            "decode", "decode-0", self.process, self.started_at, self.adopted, self.leaving
        )
        read = RegistryRead(self.server, workers, None, self.served)
        return self.fencing.answered(read, [slot], self.now)

    def pass_time(self, seconds: float) -> list[Verdict]:
        """Looks all the time; a record that nobody renews runs out. Stops at a verdict."""
        ends_at = self.now + seconds
        while self.now < ends_at - 1e-9:
            self.now += STEP_S
            if self.left is not None:
                left_s = self.left.expires_in_s - STEP_S
                self.left = Registered(self.left.epoch, left_s) if left_s > 0 else None
            if verdicts := self.look():
                return verdicts
        return []


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_worker_that_stops_beating_is_fenced_after_its_record_has_been_gone(
    rig: Rig,
) -> None:
    rig.beat()
    began = rig.now
    rig.look()
    (verdict,) = rig.pass_time(60)
    assert (verdict.worker_id, verdict.cause) == ("decode-0", "fenced")
    assert "lost its registration" in verdict.reason
    assert rig.now - began == pytest.approx(TTL_S + FENCE_S, abs=2 * STEP_S)


async def test_worker_that_beats_is_left_alone(rig: Rig) -> None:
    for _ in range(100):
        rig.beat()
        assert rig.pass_time(1) == []
    assert rig.fencing.is_registered("decode-0")


async def test_outage_of_redis_fences_nobody_and_begins_the_count_anew(rig: Rig) -> None:
    rig.beat()
    rig.look()
    assert rig.pass_time(TTL_S + FENCE_S - 1) == []
    rig.up = False
    assert rig.pass_time(1000) == []
    rig.up = True
    assert rig.pass_time(FENCE_S - STEP_S) == []
    assert [v.cause for v in rig.pass_time(2 * STEP_S)] == ["fenced"]


async def test_short_outage_begins_the_count_anew_too(rig: Rig) -> None:
    rig.beat()
    rig.look()
    assert rig.pass_time(TTL_S + FENCE_S - 1) == []
    rig.up = False
    assert rig.pass_time(2 * STEP_S) == []
    rig.up = True
    assert rig.pass_time(FENCE_S - STEP_S) == []


async def test_worker_that_registers_again_after_an_outage_is_left_alone(rig: Rig) -> None:
    rig.beat()
    rig.look()
    rig.up, rig.left = False, None
    rig.pass_time(100)
    rig.up = True
    assert rig.pass_time(1) == []
    for _ in range(20):
        rig.beat()
        assert rig.pass_time(1) == []


async def test_restart_of_redis_between_two_looks_begins_the_count_anew(rig: Rig) -> None:
    rig.beat()
    rig.look()
    assert rig.pass_time(TTL_S + FENCE_S - 1) == []
    rig.server = "redis-2"
    assert rig.pass_time(FENCE_S) == []
    assert rig.pass_time(1) != []


async def test_record_that_went_with_redis_does_not_look_like_a_deregistration(rig: Rig) -> None:
    rig.beat()
    rig.look()
    rig.server, rig.left = "redis-2", None
    assert rig.pass_time(FENCE_S) == []
    (verdict,) = rig.pass_time(1)
    assert "lost its registration" in verdict.reason


async def test_sleep_of_the_controller_itself_begins_the_count_anew(rig: Rig) -> None:
    rig.beat()
    rig.look()
    rig.left = None
    rig.now += 1000
    assert rig.look() == []
    assert rig.pass_time(FENCE_S - STEP_S) == []


async def test_worker_that_took_its_record_back_may_drain(rig: Rig) -> None:
    rig.beat()
    rig.look()
    rig.deregister()
    began = rig.now
    assert rig.pass_time(DRAIN_S - 1) == []
    (verdict,) = rig.pass_time(60)
    assert "deregistered itself" in verdict.reason
    assert rig.now - began == pytest.approx(DRAIN_S, abs=2 * STEP_S)


async def test_leaving_worker_is_exempt(rig: Rig) -> None:
    rig.beat()
    rig.look()
    rig.leaving = True
    assert rig.pass_time(1000) == []


async def test_worker_that_does_not_register_in_time_is_killed(rig: Rig) -> None:
    assert rig.pass_time(START_S) == []
    (verdict,) = rig.pass_time(1)
    assert verdict.cause == "start_timeout"
    assert "within 120 s of its start" in verdict.reason


async def test_time_without_redis_does_not_count_as_time_to_start(rig: Rig) -> None:
    rig.up = False
    assert rig.pass_time(2 * START_S) == []
    rig.up = True
    assert rig.pass_time(START_S) == []
    assert rig.pass_time(1) != []


async def test_slot_without_a_process_is_nobodys(rig: Rig) -> None:
    rig.process = None
    assert rig.pass_time(1000) == []


async def test_record_of_the_process_before_is_not_taken_for_the_new_ones(rig: Rig) -> None:
    rig.beat("old")
    rig.look()
    rig.start()
    assert rig.pass_time(START_S - 1) == [], "it was fenced when the old record ran out"
    assert not rig.fencing.is_registered("decode-0")
    rig.beat("new")
    rig.look()
    assert rig.fencing.is_registered("decode-0")


async def test_record_of_a_process_that_lived_between_two_looks_is_not_its_replacements(
    rig: Rig,
) -> None:
    rig.look()
    rig.now += 0.3
    rig.beat("unseen")
    rig.now += 0.6  # it dies, and is replaced
    rig.start()
    rig.now += 1.5
    rig.left = Registered("unseen", TTL_S - 2.1)
    assert rig.look() == []
    assert not rig.fencing.is_registered("decode-0")
    assert rig.pass_time(START_S - 10) == [], "it was fenced when the dead one's record ran out"
    rig.beat("its own")
    rig.look()
    assert rig.fencing.is_registered("decode-0")


async def test_waiting_for_a_place_is_no_part_of_a_start(rig: Rig) -> None:
    assert rig.process is not None
    rig.process.is_placed = False
    assert rig.pass_time(10 * START_S) == []
    rig.process.is_placed = True
    assert rig.pass_time(START_S - 2 * STEP_S) == []
    [verdict] = rig.pass_time(4 * STEP_S)
    assert verdict.cause == "start_timeout"


async def test_record_from_before_the_first_start_is_stale_but_not_an_adopted_workers(
    rig: Rig,
) -> None:
    rig.beat("old")
    assert rig.left is not None
    rig.fencing.remember(RegistryRead(rig.server, {"decode-0": rig.left}, None))
    rig.look()
    assert not rig.fencing.is_registered("decode-0")
    rig.start()
    rig.adopted = True
    rig.look()
    assert rig.fencing.is_registered("decode-0")


def adopt(rig: Rig, *, noted: bool) -> None:
    assert rig.process is not None
    rig.adopted = True
    rig.served = frozenset({rig.process.name}) if noted else frozenset({"decode-0/earlier"})


async def test_adopted_worker_that_had_a_record_and_has_none_is_killed_when_no_drain_lasts_so_long(
    rig: Rig,
) -> None:
    adopt(rig, noted=True)
    began = rig.now
    (verdict,) = rig.pass_time(2 * START_S)
    assert verdict.cause == "fenced"
    assert "adopted without its registration" in verdict.reason
    assert rig.now - began == pytest.approx(DRAIN_S, abs=2 * STEP_S)


async def test_adopted_worker_without_a_drain_gets_the_time_to_register_again(rig: Rig) -> None:
    adopt(rig, noted=True)
    rig.fencing._drain_limit_s = lambda _: 0.0
    assert rig.pass_time(FENCE_S) == []
    assert rig.pass_time(2 * STEP_S) != []


async def test_adopted_worker_of_which_nothing_is_noted_may_still_be_starting(rig: Rig) -> None:
    adopt(rig, noted=False)
    assert rig.pass_time(START_S) == []
    (verdict,) = rig.pass_time(1)
    assert verdict.cause == "start_timeout"


async def test_adopted_worker_that_is_registered_is_fenced_like_any_other(rig: Rig) -> None:
    adopt(rig, noted=True)
    rig.beat()
    rig.look()
    began = rig.now
    (verdict,) = rig.pass_time(60)
    assert "lost its registration" in verdict.reason
    assert rig.now - began == pytest.approx(TTL_S + FENCE_S, abs=2 * STEP_S)


async def test_those_that_were_registered_are_known_by_the_names_of_their_processes(
    rig: Rig,
) -> None:
    rig.look()
    assert rig.fencing.served() == frozenset()
    rig.beat()
    rig.look()
    rig.deregister()
    rig.look()
    assert rig.process is not None
    assert rig.fencing.served() == {rig.process.name}
    rig.start()
    rig.look()
    assert rig.fencing.served() == frozenset()
