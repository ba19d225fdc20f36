"""Simulated workers: the same every time, and true to what the policies are for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest

from baton.config import RoutingConfig
from baton.v1 import session_pb2 as pb
from benchmarks.routing import loads, oracle, trace
from benchmarks.routing.simulation import Pools, Served, Simulation, Turn
from benchmarks.routing.sizing import BLOCK_SIZE, worker_blocks

OTHERS = ("round_robin", "least_loaded", "random")


def chats(num_users: int = 12, num_turns: int = 6) -> list[list[Turn]]:
    """Chats of random tokens with a short prompt that all share."""
    rng = random.Random(3)

    def some(number: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(number)]

    shared = some(40)
    users: list[list[Turn]] = []
    for _ in range(num_users):
        prompt, turns = shared, list[Turn]()
        for _ in range(num_turns):
            prompt = [*prompt, *some(rng.randint(20, 100))]
            answer = some(rng.randint(1, 30))
            turns.append(Turn(rng.expovariate(1 / 8), prompt, answer))
            prompt = [*prompt, *answer]
        users.append(turns)
    return users


@cache
def simulated(
    policy: str, local: int = 0, share: float = 0.7, *, pulls: bool = True
) -> tuple[Simulation, list[Served]]:
    users = chats()
    asked = [oracle.Asked(turn.prompt, turn.answer) for turns in users for turn in turns]
    num_blocks = worker_blocks(asked, share)
    settings = {"policy": policy, "local_prefill_max_tokens": local, "prefill_pulls": pulls}
    config = RoutingConfig.model_validate(settings)
    simulation = Simulation(config, Pools(num_blocks, num_blocks))
    return simulation, simulation.run(users)


def num_cached(served: Sequence[Served]) -> int:
    return sum(each.num_cached for each in served)


def test_the_same_seed_gives_the_same_run() -> None:
    def facts(served: Sequence[Served]) -> list[tuple[object, ...]]:
        return [(s.user, s.sent_at, s.prefill, s.decode, s.num_cached, s.num_moved) for s in served]

    first = facts(simulated("kv_aware", 128)[1])
    simulated.cache_clear()
    assert facts(simulated("kv_aware", 128)[1]) == first


@pytest.mark.parametrize("policy", ["kv_aware", *OTHERS])
def test_every_request_is_answered_and_every_block_given_back(policy: str) -> None:
    simulation, served = simulated(policy)
    assert len(served) == 12 * 6
    for each in served:
        assert len(each.token_times) == len(each.turn.answer)
        assert each.token_times == sorted(each.token_times)
        assert 0 <= each.num_cached < len(each.turn.prompt)
    for worker in simulation.workers.values():
        worker.kv.pool.check()
        assert worker.kv.pool.counts().referenced == 0
        assert worker.session.num_open == 0


@pytest.mark.parametrize("local", [0, 128])
def test_at_rest_the_index_is_what_the_workers_hold(local: int) -> None:
    simulation, _ = simulated("kv_aware", local)
    for worker in simulation.workers.values():
        held = simulation.index.indexed_blocks(worker.session.epoch)
        assert held == worker.kv.pool.published()
        assert held


@pytest.mark.parametrize("policy", ["kv_aware", *OTHERS])
def test_no_policy_has_more_than_the_oracle(policy: str) -> None:
    served = simulated(policy)[1]
    best = oracle.infinite_cache([each.asked for each in served], BLOCK_SIZE)
    assert 0 < num_cached(served) <= best


@pytest.mark.parametrize("other", OTHERS)
def test_kv_aware_saves_more_than_policies_that_know_no_blocks(other: str) -> None:
    aware, blind = (simulated(policy, pulls=False)[1] for policy in ("kv_aware", other))
    assert num_cached(aware) > 1.2 * num_cached(blind)


def test_pulled_answers_are_not_computed_again() -> None:
    without, served = simulated("kv_aware", pulls=False)[1], simulated("kv_aware")[1]
    assert all(each.prefill is not None for each in served)
    assert num_cached(served) > num_cached(without)


def test_local_prefill_reuses_answers_and_moves_less() -> None:
    paired, local = simulated("kv_aware")[1], simulated("kv_aware", 128)[1]
    assert all(each.prefill is not None for each in paired)
    assert sum(each.prefill is None for each in local) > len(local) / 3
    assert num_cached(local) > num_cached(paired)
    assert sum(each.num_moved for each in local) < 0.6 * sum(each.num_moved for each in paired)


def test_a_hot_prompt_does_not_pin_one_worker() -> None:
    simulation = Simulation(RoutingConfig(), Pools(500, 500))
    served = simulation.run(loads.hot_prompt(num_users=60, rate=4.0))
    used = Counter(each.prefill for each in served) + Counter(each.decode for each in served)
    assert min(used[name] for name in simulation.workers) >= 15


def test_a_report_tells_how_its_worker_stood_when_the_step_under_way_began() -> None:
    """As a real worker's: its engine thread hears of an Open between two steps."""
    together = RoutingConfig(local_prefill_max_tokens=0)
    simulation = Simulation(together, Pools(500, 500, num_prefill=1, num_decode=1))
    session = simulation.workers["prefill-0"].session
    seen: list[tuple[int, int, int]] = []

    def look() -> None:
        report = session.report or pb.Report()
        seen.append((report.num_opens, report.num_waiting_tokens, session.given.num_tokens))

    for at in (0.3, 0.55, 1.05):  # reports come each half second
        simulation._after(at, look)
    long, short = [Turn(0.1, range(300), [1])], [Turn(0.2, range(400, 500), [1])]
    simulation.run([long, short])  # the first takes 0.62 s to compute
    assert seen == [(0, 0, 400), (1, 300, 100), (2, 0, 0)]


def test_the_committed_trace_is_what_its_generator_writes() -> None:
    written = trace.generate(num_users=20, num_turns=10, think_median_s=8.0, arrive_s=20.0, seed=20)
    assert trace.load(trace.DEFAULT_TRACE) == written
