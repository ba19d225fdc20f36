"""The hand-off's report, from samples that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.handoff import report
from benchmarks.handoff.report import (
    BARE_GLOO,
    CONTIGUOUS,
    MEMCPY,
    Beside,
    Results,
    Sample,
    Served,
)
from benchmarks.measured import Measured

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)
CASE = ("smollm2", 1024, 16, 16)


def samples(contender: str, *moved_s: float, slower: float = 1.0) -> list[Sample]:
    return [
        Sample(*CASE, contender, 1_000_000_000, each, each * slower, 1000 * each)
        for each in moved_s
    ]


@pytest.fixture
def results() -> Results:
    return Results(
        measured=MEASURED,
        rounds=3,
        pool_bytes=1 << 31,
        samples=(
            *samples(MEMCPY, 0.1, 0.1, 0.9),
            *samples(BARE_GLOO, 0.5, 0.4, 0.5),
            *samples(CONTIGUOUS, 0.25, 0.25, 0.25),
            *samples("shared_memory", 0.11, 0.125, 0.2, slower=2.0),
            *samples("gloo", 0.5, 0.5, 0.5),
            *samples("another", 0.2, 0.2, 0.2),
        ),
        served=(
            Served("gloo", 1000, 400.0, 8.0, 12.0),
            Served("gloo", 1000, 400.0, 8.0, 14.0),
            Served("gloo", 1000, 500.0, 9.0, 99.0),
        ),
        beside=(Beside("nothing", 10.0, 12.0, 0.0), Beside("a thread of it", 11.0, 13.0, 8.04)),
        absent={"nixl": "it is not installed"},
    )


def test_each_transport_stands_beside_its_bound_by_the_medians(results: Results) -> None:
    text = report.section(results)
    line = "| SmolLM2-135M | 1,024 | 16 | 10.0 | 8.0 | 0.80 | 4.0 | 0.40 | 125.0 |"
    assert line in report.table(results, "shared_memory")
    line = "| SmolLM2-135M | 1,024 | 16 | 2.0 | 2.0 | 1.00 | 2.0 | 1.00 | 4.0 | 0.50 | 500.0 |"
    assert line in report.table(results, "gloo")
    assert "the goal of 0.85 is reached in 0 of 1 cases; least with 16 requests of 1,024" in text
    assert "the goal of 0.9 is reached in 1 of 1 cases" in text


def test_a_transport_without_a_bound_is_shown_and_reaches_no_goal(results: Results) -> None:
    text = report.section(results)
    assert "| SmolLM2-135M | 1,024 | 16 | 5.0 | 5.0 | 200.0 |" in text
    assert "The bare transfer of another is not measured here, so it has no goal." in text


def test_a_transport_that_cannot_work_is_named_with_the_reason(results: Results) -> None:
    assert "**nixl** is not measured here: it is not installed." in report.section(results)


def test_waves_are_told_where_a_pool_has_no_room_for_all(results: Results) -> None:
    fewer = tuple(replace(each, at_once=5) for each in results.samples)
    table = report.table(replace(results, samples=fewer), "gloo")
    assert "| 16, 5 at once |" in table


def test_the_exposed_hand_off_is_a_share_of_ttft(results: Results) -> None:
    text = report.section(results)
    assert "| gloo | 1,000 | 400 | 8.0 | 2.0% | 14.0 | 3.5% |" in text
    assert (
        "exposes is 3.5% of TTFT, with 1,000 tokens over gloo (the goal of 5% is reached)" in text
    )
    slow = tuple(replace(each, exposed_ms=21.0) for each in results.served)
    assert "(the goal of 5% is missed)" in report.section(replace(results, served=slow))


def test_copying_stands_beside_decode_steps_without_it(results: Results) -> None:
    text = report.section(results)
    assert "| nothing | - | 10.0 | 12.0 |\n| a thread of it | 8.0 | 11.0 | 13.0 |" in text


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results
