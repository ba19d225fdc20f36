"""Percentiles, objectives and goodput, by numbers that can be checked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import Objectives, Record, figures_of, percentile
from benchmarks.load_report import render

RECORD = Record(
    kind="chat",
    began_at_s=0.0,
    outcome="whole",
    ttft_s=0.5,
    gaps_s=(0.02, 0.04),
    e2e_s=0.6,
    num_prompt_tokens=40,
    num_cached_tokens=16,
    num_tokens=3,
    counted_by="usage",
)
OBJECTIVES = Objectives(ttft_s=1.0, itl_s=0.05)


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (1, 1), (25, 1), (26, 2), (50, 2), (75, 3), (76, 4), (100, 4)]
)
def test_percentile_is_the_nearest_rank(percent: float, value: float) -> None:
    assert percentile([3, 1, 4, 2], percent) == value


def test_percentile_of_nothing_is_none() -> None:
    assert percentile([], 50) is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_was_measured_and_bounds_its_share(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found is not None
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values) - 1e-9


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"ttft_s": 1.0, "gaps_s": (0.05, 0.05)}, True),
        ({"ttft_s": 1.001}, False),
        ({"gaps_s": (0.02, 0.051)}, False),
        ({"gaps_s": ()}, True),
        ({"outcome": "failed"}, False),
        ({"outcome": "overdue"}, False),
        ({"ttft_s": None}, False),
    ],
)
def test_good_is_whole_and_within_both_objectives(change: dict[str, object], good: bool) -> None:
    assert OBJECTIVES.met_by(replace(RECORD, **change)) is good  # type: ignore[arg-type]


def test_one_long_gap_of_many_misses_the_99th_percentile_but_not_the_90th() -> None:
    record = replace(RECORD, gaps_s=(*[0.01] * 40, 0.6))
    assert not Objectives(1.0, 0.05, 99).met_by(record)
    assert Objectives(1.0, 0.05, 90).met_by(record)


def test_the_mean_hides_a_pause_that_the_percentile_shows() -> None:
    record = replace(RECORD, gaps_s=(*[0.01] * 40, 0.6))
    assert not OBJECTIVES.met_by(record)
    assert OBJECTIVES.met_on_average_by(record)


def test_goodput_counts_failed_and_overdue_requests_among_all() -> None:
    records = [
        RECORD,
        replace(RECORD, began_at_s=1.0),
        replace(RECORD, began_at_s=2.0, ttft_s=3.0, outcome="overdue", e2e_s=5.0),
        replace(RECORD, began_at_s=3.0, outcome="failed", failure="cut: x", failure_kind="cut"),
    ]
    figures = figures_of(records, OBJECTIVES, duration_s=8.0)
    assert (figures.num_whole, figures.num_overdue, figures.num_failed) == (2, 1, 1)
    assert (figures.num_good, figures.good_share, figures.goodput_per_s) == (2, 0.5, 0.25)
    assert (figures.num_tokens, figures.tokens_per_s) == (12, 1.5)
    assert figures.failures == {"cut: x": 1}


def test_goodput_and_tokens_are_over_the_same_time_by_default_the_whole_span() -> None:
    figures = figures_of([replace(RECORD, began_at_s=1.0, e2e_s=2.0), RECORD], OBJECTIVES)
    assert figures.duration_s == 3.0
    assert figures.goodput_per_s == pytest.approx(2 / 3)
    assert figures.tokens_per_s == pytest.approx(6 / 3)


def test_percentiles_are_without_failed_requests_and_with_overdue_ones() -> None:
    records = [
        replace(RECORD, ttft_s=0.25),
        replace(RECORD, ttft_s=9.0, outcome="failed", gaps_s=(7.0,)),
        replace(RECORD, ttft_s=4.0, outcome="overdue", gaps_s=()),
    ]
    figures = figures_of(records, OBJECTIVES)
    assert figures.ttft_s == {50: 0.25, 90: 4.0, 99: 4.0}
    assert figures.itl_s == {50: 0.02, 90: 0.04, 99: 0.04}
    assert figures.tpot_s[50] == pytest.approx(0.03)


def test_figures_of_nothing_are_none_and_nought() -> None:
    figures = figures_of([], OBJECTIVES)
    assert (figures.num_requests, figures.good_share, figures.goodput_per_s) == (0, 0.0, 0.0)
    assert figures.tokens_per_s == 0.0
    assert set(figures.ttft_s.values()) == {None}
    assert "goodput      0.00 requests/s" in render([], OBJECTIVES, num_cut=0)


def test_a_record_survives_its_file() -> None:
    record = replace(RECORD, late_s=0.001, failure="status: 429", failure_kind="status")
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_the_summary_names_figures_failures_and_what_was_cut_off() -> None:
    failed = replace(RECORD, outcome="failed", failure="status: 429 overloaded: full")
    long = replace(RECORD, kind="document", ttft_s=2.0)
    text = render([RECORD, long, failed], OBJECTIVES, num_cut=2)
    assert "33.3% of 3: TTFT within 1000 ms and ITL p99 within 50 ms" in text
    assert "1 x status: 429 overloaded: full" in text
    assert "cut off      2 by the end of the run" in text
    row = next(line for line in text.splitlines() if line.startswith("document"))
    assert row.split() == ["document", "TTFT", "1", "0%", "2000.0", "2000.0", "2000.0"]
