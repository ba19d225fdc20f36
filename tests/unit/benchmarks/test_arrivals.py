"""Open-loop plans: the same for every system, Poisson, with the shares that were asked for."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from benchmarks.arrivals import Load, Plan, make_phase, make_plan

LOAD = Load(long_share=0.25, long_tokens=60, answer_tokens=8, bound_s=5.0)


def test_a_plan_is_a_function_of_its_seed() -> None:
    one, again, other = (
        make_plan(seed, LOAD, rates=[0.5, 2.0], num_requests=20) for seed in ("a", "a", "b")
    )
    assert one == again
    assert one != other


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan("a", LOAD, rates=[0.5, 2.0], num_requests=20)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("rate", "window_s", "num"), [(0.5, 12, 6), (2, 12, 24), (0.01, 100, 1)])
def test_number_rate_and_share_are_exact(rate: float, window_s: float, num: int) -> None:
    phase = make_phase("a", LOAD, rate_per_s=rate, num_requests=num)
    arrivals = phase.arrivals
    assert phase.window_s == pytest.approx(window_s)
    assert len(arrivals) == num
    assert sum(arrival.kind == "long" for arrival in arrivals) == round(num / 4)
    moments = [arrival.at_s for arrival in arrivals]
    assert moments == sorted(moments)
    assert all(0 <= moment <= window_s for moment in moments)


def test_gaps_are_as_a_poisson_process_has_them() -> None:
    arrivals = make_phase("a", LOAD, rate_per_s=10, num_requests=4000).arrivals
    moments = [arrival.at_s for arrival in arrivals]
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    # Exponential: the deviation is as large as the mean; 0 for a clock, 0.58 for uniform gaps.
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, abs=0.1)


def test_long_prompts_are_long_and_no_two_prompts_begin_alike() -> None:
    plan = make_plan("a", LOAD, rates=[3.0, 4.0], num_requests=70)
    texts = {"chat": [], "long": []}
    for phase in plan.phases:
        for arrival in phase.arrivals:
            texts[arrival.kind].append(arrival.messages[0]["content"])
    every = [text[:40] for kind in texts.values() for text in kind]
    assert len(set(every)) == len(every)
    assert min(map(len, texts["long"])) > max(map(len, texts["chat"]))
