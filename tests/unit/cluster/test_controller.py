"""The pool controller over a fake backend, a fake Redis and a fake clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from support.controller_rig import SETTINGS, ControllerRig
from support.fake_pools import FakeProcess

from baton.errors import InvalidRequestError, UnavailableError
from cluster.controller_store import Registered, RegistryRead
from cluster.slots import STABLE_S


@pytest.fixture
async def rig() -> AsyncIterator[ControllerRig]:
    rig = ControllerRig()
    yield rig
    await rig.close()


def settings(**over: Any) -> dict[str, Any]:
    return {**SETTINGS, **over}


async def test_pools_begin_as_configured_and_are_stored(rig: ControllerRig) -> None:
    await rig.begin()
    assert rig.running() == ["decode-0", "decode-1", "prefill-0"]
    assert rig.stored() == {"prefill": 1, "decode": 2}


async def test_scaling_up_adds_and_scaling_down_retires_the_highest(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.wish(decode=4)
    assert rig.running() == ["decode-0", "decode-1", "decode-2", "decode-3", "prefill-0"]
    assert rig.stored() == {"prefill": 1, "decode": 4}
    await rig.wish(decode=1)
    assert rig.running() == ["decode-0", "prefill-0"]
    assert all(p.stop_asked and not p.killed for p in rig.backend.started if p.end.done())


async def test_pool_can_be_emptied_and_filled_again(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.wish(prefill=0)
    assert rig.running() == ["decode-0", "decode-1"]
    await rig.wish(prefill=2)
    assert rig.running() == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


async def test_scaling_one_pool_leaves_the_others_processes_alone(rig: ControllerRig) -> None:
    await rig.begin()
    before = rig.backend.running()["prefill-0"]
    await rig.wish(decode=5)
    await rig.wish(decode=1)
    assert rig.backend.running()["prefill-0"] is before
    assert not before.stop_asked


async def test_name_of_a_worker_that_is_still_leaving_is_not_given_again(
    rig: ControllerRig,
) -> None:
    rig.backend.heeds_stop = False
    await rig.begin()
    await rig.wish(decode=1)
    leaving = rig.backend.running()["decode-1"]
    assert rig.controller.pools()["decode"].leaving == 1
    await rig.wish(decode=2)
    assert rig.running() == ["decode-0", "decode-1", "decode-2", "prefill-0"]
    assert rig.backend.running()["decode-1"] is leaving
    leaving.die(0, "ended")
    await rig.settle()
    await rig.wish(decode=3)
    assert rig.running() == ["decode-0", "decode-1", "decode-2", "prefill-0"]
    assert rig.controller.pools()["decode"].leaving == 0


async def test_leaving_worker_has_its_pools_drain_and_a_margin() -> None:
    pools = {"decode": {"replicas": 2, "worker": {"drain_s": 100.0}}}
    rig = ControllerRig(settings(pools=pools, cluster={"stop_timeout_s": 7, "fence_s": 7200}))
    rig.backend.heeds_stop = False
    await rig.begin()
    await rig.wish(decode=1)
    process = rig.backend.running()["decode-1"]
    rig.clock.now += 106.9
    await rig.wish(decode=1)  # wakes nobody
    rig.controller._reconciler.reconcile()
    await rig.settle()
    assert not process.killed
    rig.clock.now += 0.2
    rig.controller._reconciler.reconcile()
    await rig.settle()
    assert process.killed
    await rig.close()


async def test_slot_without_a_process_leaves_first(rig: ControllerRig) -> None:
    await rig.begin()
    rig.backend.running()["decode-0"].die()
    await rig.settle()
    await rig.wish(decode=1)
    assert rig.running() == ["decode-1", "prefill-0"]
    rig.clock.now += 1000
    await rig.wish(decode=1)
    assert rig.running() == ["decode-1", "prefill-0"]


async def test_worker_that_never_came_up_leaves_before_one_that_serves(
    rig: ControllerRig,
) -> None:
    await rig.begin()
    rig.store.register("decode-1")
    await rig.controller.look()
    await rig.wish(decode=1)
    assert rig.running() == ["decode-1", "prefill-0"]


async def test_worker_that_waits_for_its_retry_is_not_disturbed_by_scaling_up(
    rig: ControllerRig,
) -> None:
    await rig.begin()
    rig.backend.running()["decode-0"].die()
    await rig.settle()
    await rig.wish(decode=3)
    assert rig.running() == ["decode-1", "decode-2", "prefill-0"]
    rig.clock.now += 1
    await rig.wish(decode=4)
    assert rig.running() == ["decode-0", "decode-1", "decode-2", "decode-3", "prefill-0"]


async def test_refused_wish_changes_nothing(rig: ControllerRig) -> None:
    await rig.begin()
    stored = rig.store.wishes
    with pytest.raises(InvalidRequestError):
        await rig.wish(prefill=3, decode=0)
    assert rig.store.wishes == stored
    assert rig.running() == ["decode-0", "decode-1", "prefill-0"]
    assert rig.metric("baton_scale_wishes_total", outcome="refused") == 1


async def test_wish_while_redis_is_away_is_refused_and_changes_nothing(
    rig: ControllerRig,
) -> None:
    await rig.begin()
    rig.store.up = False
    with pytest.raises(UnavailableError, match=r"Redis does not answer.*nothing was changed"):
        await rig.wish(decode=5)
    assert rig.controller.pools()["decode"].desired == 2
    assert rig.running() == ["decode-0", "decode-1", "prefill-0"]
    assert rig.metric("baton_scale_wishes_total", outcome="unavailable") == 1
    rig.store.up = True
    await rig.wish(decode=3)
    assert rig.metric("baton_scale_wishes_total", outcome="accepted") == 1


async def test_controller_that_may_have_lost_its_lease_writes_nothing(rig: ControllerRig) -> None:
    await rig.begin()
    rig.is_sole = False
    with pytest.raises(UnavailableError, match=r"another controller.*nothing was changed"):
        await rig.wish(decode=3)
    assert (rig.stored()["decode"], rig.controller.pools()["decode"].desired) == (2, 2)
    assert rig.metric("baton_scale_wishes_total", outcome="unavailable") == 1
    rig.store.wishes = others = b"what the other one has written"
    await rig.controller.look()
    assert rig.store.wishes == others
    rig.is_sole = True
    await rig.controller.look()
    assert rig.stored()["decode"] == 2


async def test_sizes_are_written_again_where_redis_has_lost_them(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.wish(decode=4)
    rig.store.wishes = None
    await rig.controller.look()
    assert rig.stored() == {"prefill": 1, "decode": 4}


async def test_worker_whose_registration_is_gone_is_killed_and_replaced() -> None:
    rig = ControllerRig(settings(registry={}, cluster={"fence_s": 5}))
    await rig.begin()
    rig.register_all()
    await rig.controller.look()
    rig.store.workers.pop("decode-1")
    victim = rig.backend.running()["decode-1"]
    rig.clock.now += STABLE_S
    for _ in range(60):  # the record is seen to run out, and to stay away
        rig.clock.now += 0.25
        await rig.controller.look()
    await rig.settle()
    assert victim.killed
    assert rig.backend.ids().count("decode-1") == 2
    assert rig.backend.ids().count("decode-0") == 1
    assert rig.metric("baton_worker_replacements_total", pool="decode", cause="fenced") == 1
    died = next(event for event in rig.events if event.kind == "died")
    assert "lost its registration" in died.reason
    await rig.close()


async def test_worker_that_does_not_register_in_time_is_killed_and_tried_again() -> None:
    rig = ControllerRig(settings(registry={}, cluster={"start_timeout_s": 60}))
    await rig.begin()
    rig.register_all()
    rig.store.workers.pop("prefill-0")
    for _ in range(61):
        rig.clock.now += 1
        await rig.controller.look()
    await rig.settle()
    assert [process.worker_id for process in rig.backend.started if process.killed] == ["prefill-0"]
    labels = {"pool": "prefill", "cause": "start_timeout"}
    assert rig.metric("baton_worker_replacements_total", **labels) == 1
    await rig.close()


async def test_how_long_a_worker_has_lived_counts_from_its_registration() -> None:
    rig = ControllerRig(settings(registry={}, cluster={}))
    await rig.begin()
    rig.store.register("decode-0")
    await rig.controller.look()
    rig.clock.now += STABLE_S
    await rig.controller.look()
    for worker_id in ("decode-0", "decode-1"):
        rig.backend.running()[worker_id].die()
    await rig.settle()
    died = {event.worker_id: event.retry_in_s for event in rig.events if event.kind == "died"}
    assert died == {"decode-0": 0.0, "decode-1": 0.5}
    await rig.close()


async def test_outage_of_redis_kills_nobody() -> None:
    rig = ControllerRig(settings(registry={}, cluster={"fence_s": 5}))
    await rig.begin()
    rig.register_all()
    await rig.controller.look()
    rig.store.up = False
    for _ in range(100):
        rig.clock.now += 0.25
        await rig.controller.look()
    assert not rig.controller.registry_up
    rig.store.up, rig.store.workers = True, {}
    for _ in range(4):
        rig.clock.now += 0.25
        await rig.controller.look()
    rig.register_all()
    for _ in range(100):
        rig.clock.now += 0.25
        await rig.controller.look()
    await rig.settle()
    assert rig.controller.registry_up
    assert not any(process.killed for process in rig.backend.started)
    await rig.close()


async def test_redis_that_comes_and_goes_kills_nobody() -> None:
    rig = ControllerRig(settings(registry={}, cluster={"fence_s": 5}))
    await rig.begin()
    rig.register_all()
    await rig.controller.look()
    rig.store.workers = {}
    for number in range(200):
        rig.store.up = number % 10 > 0
        rig.clock.now += 0.45
        await rig.controller.look()
    await rig.settle()
    assert not any(process.killed for process in rig.backend.started)
    await rig.close()


async def test_ready_workers_are_the_registered_ones_that_stay(rig: ControllerRig) -> None:
    rig.backend.heeds_stop = False
    await rig.begin()
    rig.store.register("decode-0")
    await rig.controller.look()
    status = rig.controller.pools()["decode"]
    assert (status.desired, status.running, status.ready, status.leaving) == (2, 2, 1, 0)
    rig.store.register("decode-1")
    await rig.wish(decode=1)
    await rig.controller.look()
    status = rig.controller.pools()["decode"]
    assert (status.desired, status.running, status.ready, status.leaving) == (1, 1, 1, 1)
    rig.controller.publish()
    labels = {"pool": "decode", "role": "decode"}
    for name, value in (("desired", 1), ("running", 1), ("ready", 1), ("leaving", 1)):
        assert rig.metric(f"baton_pool_{name}_workers", **labels) == value


async def test_death_is_counted_by_its_cause(rig: ControllerRig) -> None:
    await rig.begin()
    rig.backend.running()["prefill-0"].die()
    await rig.settle()
    assert rig.metric("baton_worker_replacements_total", pool="prefill", cause="died") == 1
    assert rig.metric("baton_worker_replacements_total", pool="decode", cause="died") == 0


# ------------------------------------------------------------------- restart


async def test_next_controller_honours_wishes_and_adopts_what_runs(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.wish(decode=3)
    await rig.controller.close()
    rig.backend.adoptable = rig.backend.running()
    started = len(rig.backend.started)
    rig.another()
    await rig.begin()
    assert rig.controller.pools()["decode"].desired == 3
    assert rig.controller.pools()["decode"].running == 3
    assert len(rig.backend.started) == started, "what ran was started again"
    assert not any(process.stop_asked for process in rig.backend.started)


async def test_next_controller_starts_what_died_meanwhile(rig: ControllerRig) -> None:
    rig.backend.adoptable = {"decode-1": FakeProcess("decode-1")}
    rig.store.register("decode-0", epoch="of the dead one")
    await rig.begin()
    assert sorted(rig.backend.ids()) == ["decode-0", "prefill-0"]
    await rig.controller.look()
    assert rig.controller.pools()["decode"].ready == 0, "a dead worker's record counted"


async def test_workers_of_another_generation_stay_and_leave_before_newer_ones(
    rig: ControllerRig, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["prefill-0", "decode-0", "decode-1"]
    rig.backend.adoptable = {name: FakeProcess(name) for name in names}
    for name in names:
        rig.store.register(name, generation="old" if name == "decode-0" else "0")
    await rig.begin()
    assert rig.running() == sorted(names), "it serves the gateways of its generation"
    await rig.controller.look()
    told = [r.getMessage() for r in caplog.records if "generation" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("decode-0 is of generation 'old' and our gateways are of '0'")
    await rig.wish(decode=3)
    rig.store.register("decode-2")
    await rig.controller.look()
    await rig.wish(decode=2)
    assert rig.running() == ["decode-1", "decode-2", "prefill-0"]


async def test_worker_that_vanished_while_there_was_no_controller_is_fenced_by_the_next() -> None:
    times = {"fence_s": 5, "start_timeout_s": 600, "stop_timeout_s": 10}
    rig = ControllerRig(settings(registry={}, worker={"drain_s": 20}, cluster=times))
    await rig.begin()
    rig.register_all()
    await rig.controller.look()
    await rig.controller.close()
    rig.backend.adoptable = rig.backend.running()
    rig.backend.adoptable["prefill-0"] = FakeProcess("prefill-0")  # nobody saw it registered
    del rig.store.workers["decode-1"], rig.store.workers["prefill-0"]
    rig.another()
    await rig.begin()
    for _ in range(31):
        assert not any(process.killed for process in rig.backend.adoptable.values())
        rig.clock.now += 1
        await rig.controller.look()
    await rig.settle()
    killed = [name for name, process in rig.backend.adoptable.items() if process.killed]
    assert killed == ["decode-1"]
    await rig.close()


async def test_who_was_registered_is_noted_of_those_that_run_also_in_an_emptied_redis(
    rig: ControllerRig,
) -> None:
    await rig.begin()
    rig.store.register("decode-0")
    rig.store.register("decode-1")
    await rig.controller.look()
    first, second = (rig.backend.running()[name].name for name in ("decode-0", "decode-1"))
    assert rig.store.served == {first, second}
    rig.store.workers, rig.store.served = {}, frozenset()
    await rig.controller.look()
    assert rig.store.served == {first, second}
    rig.backend.running()["decode-0"].die()
    await rig.settle()
    await rig.controller.look()
    assert rig.store.served == {second}


async def test_of_adopted_workers_those_that_serve_nobody_go_first(rig: ControllerRig) -> None:
    names = ["prefill-0", "decode-0", "decode-1", "decode-2"]
    rig.backend.adoptable = {name: FakeProcess(name) for name in names}
    for name in ("prefill-0", "decode-0", "decode-2"):
        rig.store.register(name)  # decode-1 drains: it has deregistered
    await rig.begin()
    adopted = rig.backend.adoptable
    assert [name for name in names if adopted[name].stop_asked] == ["decode-1"]


async def test_adopted_workers_that_are_too_many_or_nobodys_are_retired(
    rig: ControllerRig,
) -> None:
    names = ["decode-0", "decode-3", "decode-7", "old-0", "prefill-0"]
    rig.backend.adoptable = {name: FakeProcess(name) for name in names}
    await rig.begin()
    assert rig.running() == ["decode-0", "decode-3", "prefill-0"]
    assert rig.backend.started == []


async def test_configuration_that_has_changed_wins_over_the_wish(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.wish(prefill=3, decode=5)
    await rig.controller.close()
    rig.backend.adoptable = rig.backend.running()
    pools = {"prefill": {"replicas": 1}, "decode": {"replicas": 3}}
    rig.config = ControllerRig(settings(pools=pools)).config
    rig.another()
    await rig.begin()
    assert {name: p.desired for name, p in rig.controller.pools().items()} == {
        "prefill": 3,
        "decode": 3,
    }


async def test_controller_of_a_launcher_begins_anew_whatever_redis_holds(
    rig: ControllerRig,
) -> None:
    await rig.begin()
    await rig.wish(decode=5)
    await rig.close()
    rig.another()
    await rig.begin(anew=True)
    assert rig.running() == ["decode-0", "decode-1", "prefill-0"]
    assert rig.stored() == {"prefill": 1, "decode": 2}


async def test_controller_that_let_go_starts_nobody(rig: ControllerRig) -> None:
    await rig.begin()
    await rig.controller.close()
    rig.backend.running()["decode-0"].die()
    rig.clock.now += 1000
    await rig.settle()
    assert len(rig.backend.started) == 3
    with pytest.raises(UnavailableError, match="going away"):
        await rig.wish(decode=3)


async def test_answer_that_comes_late_shows_no_replacement_in_a_dead_ones_record(
    rig: ControllerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.begin()
    await rig.controller.look()
    rig.clock.now += 0.3  # it has registered, and nobody has looked
    rig.backend.running()["decode-0"].die()
    await rig.settle()
    rig.clock.now += 0.6
    rig.controller._reconciler.reconcile()
    await rig.settle()
    assert rig.backend.ids().count("decode-0") == 2
    rig.clock.now += 1.5
    rig.store.workers["decode-0"] = Registered("of the dead one", 5.0 - 2.1)
    read = rig.store.read

    async def read_late(worker_ids: Sequence[str]) -> RegistryRead:
        answer = await read(worker_ids)
        rig.clock.now += 1.0
        return answer

    monkeypatch.setattr(rig.store, "read", read_late)
    await rig.controller.look()
    assert rig.controller.pools()["decode"].ready == 0
    rig.store.register("decode-0", "its own")
    await rig.controller.look()
    assert rig.controller.pools()["decode"].ready == 1
