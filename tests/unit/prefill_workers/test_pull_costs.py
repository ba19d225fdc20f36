"""Moved or computed: what the worker's own measurements make of it."""

from __future__ import annotations

import pytest

from prefill_workers.pull_costs import (
    FORGOTTEN_S,
    HALF_LIFE_S,
    MIN_BLOCKS,
    SHORTEST_S,
    PullCosts,
    RunningLine,
)

BLOCK = 16
LENDER, ANOTHER = b"decode-0", b"decode-1"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def costs(clock: Clock | None = None) -> PullCosts:
    return PullCosts(block_size=BLOCK, token_bytes=50_000, step_tokens=512, clock=clock or Clock())


def computes(costs: PullCosts, token_s: float, *, step_s: float = 0.01) -> None:
    for num_tokens in (512, 300, 64, 512):
        costs.computed(num_tokens, step_s + token_s * num_tokens)


def moves(costs: PullCosts, token_s: float, *, fixed_s: float = 0.01) -> None:
    for num_tokens in (1000, 300, 64, 1000):
        costs.moved(num_tokens, fixed_s + token_s * num_tokens, LENDER)


def test_line_is_that_of_its_measurements_once_there_are_some() -> None:
    line = RunningLine(0.1, 0.01, Clock())
    assert line.fit() == pytest.approx((0.1, 0.01))
    for _ in range(50):
        for num_tokens in (100, 1000):
            line.observe(num_tokens, 0.03 + 0.002 * num_tokens)
    assert line.fit() == pytest.approx((0.03, 0.002), rel=0.05)


@pytest.mark.parametrize("points", [[(100, 2.0), (1000, 1.0)], [(100, 0.0), (1000, 90.0)]])
def test_neither_end_of_the_line_is_negative(points: list[tuple[int, float]]) -> None:
    line = RunningLine(0.0, 0.0, Clock())
    for _ in range(10):
        for num_tokens, seconds in points:
            line.observe(num_tokens, seconds)
    fixed_s, token_s = line.fit()
    assert min(fixed_s, token_s) == 0.0
    assert max(fixed_s, token_s) > 0.0


def test_few_blocks_are_computed_however_dear_that_is() -> None:
    slow = costs()
    computes(slow, 1.0)
    assert not slow.moving_pays(MIN_BLOCKS * BLOCK - 1, LENDER)
    assert slow.moving_pays(MIN_BLOCKS * BLOCK, LENDER)
    assert not slow.moving_pays(-BLOCK, LENDER)


def test_the_cheaper_of_both_measured_rates_decides() -> None:
    far, near = costs(), costs()
    for each in (far, near):
        computes(each, 1e-3)
    moves(far, 5e-3)
    moves(near, 1e-4)
    assert not far.moving_pays(1000, LENDER)
    assert near.moving_pays(1000, LENDER)


def test_fixed_cost_decides_for_short_ones() -> None:
    distant = costs()
    computes(distant, 1e-3)
    moves(distant, 1e-5, fixed_s=0.2)
    assert [distant.moving_pays(n, LENDER) for n in (64, 128, 512, 2000)] == [
        False,
        False,
        True,
        True,
    ]


def test_before_any_measurement_a_long_answer_is_moved() -> None:
    assert costs().moving_pays(1000, LENDER)


def test_slow_pulls_are_tried_again_when_they_are_forgotten() -> None:
    clock = Clock()
    once_slow = costs(clock)
    moves(once_slow, 5e-3)
    assert not once_slow.moving_pays(1000, LENDER)
    clock.now += 12 * HALF_LIFE_S
    assert once_slow.moving_pays(1000, LENDER)


def test_patience_is_what_computing_would_take() -> None:
    each = costs()
    for _ in range(20):
        computes(each, 1e-3)
    assert each.patience_s(2000) == pytest.approx(2000 * 1e-3 + 4 * 0.01, rel=0.1)
    assert each.patience_s(1) == SHORTEST_S


def test_one_pull_in_a_machine_s_pause_is_soon_forgotten() -> None:
    clock = Clock()
    paused = costs(clock)
    computes(paused, 1e-3)
    paused.moved(160, 30.0, LENDER)
    assert not paused.moving_pays(160, LENDER)
    clock.now += 4 * HALF_LIFE_S
    computes(paused, 1e-3)
    assert paused.moving_pays(160, LENDER)


def test_late_pull_says_nothing_of_other_lenders() -> None:
    each = costs()
    computes(each, 1e-3)
    each.late(160, LENDER)
    assert not each.moving_pays(160, LENDER)
    assert each.moving_pays(160, ANOTHER)


def test_lenders_that_are_gone_are_not_kept() -> None:
    clock = Clock()
    each = costs(clock)
    for number in range(5):
        each.late(160, bytes([number]))
    clock.now += FORGOTTEN_S / 2
    each.late(160, LENDER)
    clock.now += FORGOTTEN_S / 2 + 1
    each.late(160, ANOTHER)
    assert set(each._moved) == {LENDER, ANOTHER}
