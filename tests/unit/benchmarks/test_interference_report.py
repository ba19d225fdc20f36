"""The interference experiment's figures, and what its report says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chat_stream import ChatStream
from benchmarks.interference import plot, report
from benchmarks.interference.client import Load, Observed
from benchmarks.interference.compare import best, systems
from benchmarks.interference.results import (
    PERCENTS,
    Results,
    Round,
    Setting,
    Tried,
    round_of,
)
from benchmarks.interference.systems import (
    COLOCATED,
    DISAGGREGATED,
    VLLM,
    VLLM_DISAGGREGATED,
)
from benchmarks.measured import Measured

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)
LOAD = Load(4, 1000, 0.25, 2, 1500, 16, 60.0, 8, 128)
P50_MS = {DISAGGREGATED: 15.0, COLOCATED: 14.0, VLLM: 24.0, VLLM_DISAGGREGATED: 87.0}


def stream_of(began_at: float, ttft_s: float | None, *gaps_s: float) -> ChatStream:
    stream = ChatStream(began_at)
    stream.ttft_s = ttft_s
    stream.gaps_s = list(gaps_s)
    return stream


def a_round(system: str, number: int, p50_ms: float) -> Round:
    times = [p50_ms * factor for factor in (1, 1, 1.1, 1.2, 1.4, 1.6, 2, 4, 9)]
    return Round(
        system=system,
        round=number,
        itl_ms=tuple(times),
        num_gaps=1000,
        paused_share=0.25,
        ttft_s=(1.0 + number, 2.0),
        num_overdue=0,
        num_failed=1 if system == VLLM and number == 1 else 0,
        streams_tokens_per_s=100.0,
        step_ms=p50_ms,
        start_s=3.0,
        pss_mb=2000.0,
        longest_ms=(20.0, 0.0, 30.0) if number == 0 else (),
    )


@pytest.fixture
def results() -> Results:
    compared = systems(64, 128, peers=True)
    rounds = [
        a_round(system.name, number, P50_MS.get(system.name, 30.0) + number)
        for number in range(3)
        for system in compared
    ]
    tried = (Tried(64, 14.0, 60.0, 1.1), Tried(512, 12.0, 200.0, 0.9))
    return Results(MEASURED, LOAD, 1530, (0.1, 5.0), 3, "1.2.3", tried, compared, tuple(rounds))


# --------------------------------------------------------------------------- figures


def figures(observed: Observed) -> Round:
    return round_of(Setting(VLLM, 0, 20.0, 3.0, 2000.0), observed, bound_s=60.0)


def test_only_gaps_that_end_within_the_window_count() -> None:
    streams = [
        stream_of(8.0, 1.0, 0.9, 0.3, 0.25, 0.03, 9.0),  # at 9, 9.9, 10.2, 10.45, 10.48, 19.48
        stream_of(10.0, None),
    ]
    found = figures(Observed(10.0, 12.0, streams, [stream_of(10.0, 0.5)], 0, 0))
    assert found.num_gaps == 3
    assert (found.itl(50), found.itl(100)) == (250.0, 300.0)
    assert found.streams_tokens_per_s == 1.5
    assert found.longest_ms[:2] == (300.0, 250.0)


def test_a_pause_counts_by_its_length() -> None:
    stream = stream_of(9.0, 1.0, *[0.05] * 10, 1.5)
    found = figures(Observed(9.5, 13.0, [stream], [stream_of(10.0, 0.5)], 0, 0))
    assert found.paused_share == 0.75


def test_a_prompt_without_a_first_token_counts_as_long_as_it_was_waited_for() -> None:
    prompts = [stream_of(10.0, 0.5), stream_of(10.0, None)]
    found = figures(Observed(9.0, 12.0, [stream_of(9.0, 0.1, 0.5)], prompts, 1, 0))
    assert found.ttft_s == (0.5, 60.0)
    assert found.ttft(90) == 60.0


def test_a_window_without_any_token_is_no_result() -> None:
    with pytest.raises(ValueError, match="no token came"):
        figures(Observed(9.0, 12.0, [stream_of(9.0, None)], [], 0, 0))


def test_the_best_chunk_has_the_lowest_p99_of_those_in_time() -> None:
    late, fair, large = Tried(16, 9, 20, 3.5), Tried(64, 10, 60, 2.9), Tried(512, 11, 300, 1.0)
    assert best([large, late, fair]) == 64
    assert best([late, replace(fair, ttft_p90_s=4.0)]) == 16


# ---------------------------------------------------------------------------- report


def test_the_table_has_medians_of_the_rounds(results: Results) -> None:
    row = next(x for x in report.table(results).splitlines() if f"| {VLLM} |" in x)
    assert row == (
        "| vllm | 25.0 | 40.0 | 100.0 | 225.0 | 25.0% | 2.00 | 2.00 | 320 | 2,000 | 3 | 0 | 1 |"
    )


def test_goals_say_whether_they_are_reached(results: Results) -> None:
    text = report.goals_table(results)
    assert "| ITL p50 ≤ 40 ms | 16.0 ms | reached |" in text
    assert "| ITL p99 ≤ 2 × its own p50 | 1.60 × | reached |" in text
    assert "| ITL p99 ≤ 0.1 × that of *vllm* | 0.640 × | **missed** |" in text
    assert "| long prompts' TTFT p90 ≤ 3 s | 2.00 s | reached |" in text
    assert "| tokens/s at 8 ≥ 2 × those of *vllm disaggregated* | 5.50 × | reached |" in text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"itl_ms": tuple([41.0] * len(PERCENTS))}, "| ITL p50 ≤ 40 ms | 41.0 ms | **missed** |"),
        (
            {"itl_ms": (*[10.0] * 5, *[21.0] * 4)},
            "| ITL p99 ≤ 2 × its own p50 | 2.10 × | **missed** |",
        ),
        ({"ttft_s": (3.1,)}, "| long prompts' TTFT p90 ≤ 3 s | 3.10 s | **missed** |"),
        ({"step_ms": 50.0}, "≥ 2 × those of *vllm disaggregated* | 1.76 × | **missed** |"),
    ],
)
def test_a_missed_goal_is_said(results: Results, change: dict[str, object], line: str) -> None:
    rounds = [replace(r, **change) if r.system == DISAGGREGATED else r for r in results.rounds]
    assert line in report.goals_table(replace(results, rounds=tuple(rounds)))


def test_without_peers_nothing_is_said_of_them(results: Results) -> None:
    own = systems(64, 128, peers=False)
    rounds = tuple(r for r in results.rounds if r.system in {DISAGGREGATED, COLOCATED})
    text = report.section(
        replace(results, systems=own, rounds=rounds, tried=(), vllm_version=""), "a.svg"
    )
    assert "vllm" not in text
    assert "chunk size" not in text


def test_the_section_says_where_it_ran_and_what_it_costs(results: Results) -> None:
    text = report.section(results, "a.svg")
    assert (
        "| prefill worker (1 thread), gateway, controller, Redis, client | decode worker |" in text
    )
    assert "*vllm* is version 1.2.3" in text
    assert "tokens/s at 8 streams 500 against 533" in text
    assert "| 64 (taken) | 14.0 | 60.0 | 1.10 |" in text
    assert "| 512 | 12.0 | 200.0 | 0.90 |" in text
    assert "![the streams' gaps, and the long prompts' TTFT](a.svg)" in text


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results


def test_the_plot_is_a_function_of_the_results(results: Results, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot.draw(results, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert DISAGGREGATED in drawn
