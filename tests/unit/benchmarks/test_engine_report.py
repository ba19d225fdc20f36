"""The engine's report, from samples that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import report
from benchmarks.engine.bound import Bound
from benchmarks.engine.report import Results, Sample, Server
from benchmarks.measured import Measured

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


def bound(step_ms: float) -> Bound:
    return Bound(2, {"1": step_ms, "32": 2 * step_ms}, 1030, 300.0, 40.0)


@pytest.fixture
def results() -> Results:
    samples = [
        Sample("baton", streams, tokens, ms)
        for streams, tokens, times in (
            (1, 90, (12.0, 15.0, 99.0)),
            (32, 90, (30.0, 31.0, 32.0)),
            (0, 1055, (400.0, 400.0, 500.0)),
        )
        for ms in times
    ]
    bounds = (bound(10.0), bound(9.0), bound(20.0))
    return Results(MEASURED, 64, 96, bounds, (Server("baton", 4.0, 900.0),), tuple(samples))


def test_the_section_says_what_the_figures_say(results: Results) -> None:
    text = report.section(results)
    assert "| step at 1 | 10.0 | 15.0 | 1.50 |" in text
    assert "| step at 32 | 20.0 | 31.0 | 1.55 |" in text
    assert "| a prompt's TTFT | 300.0 | 400.0 | 1.33 |" in text
    assert "| baton | 4.0 | 900 | 67 | 1032 |" in text
    assert "A step at 1 takes 1.50 of its bound (the goal of 1.5 is reached)." in text
    assert "A step at 32 takes 1.55 of its bound (the goal of 1.5 is missed)." in text
    assert "A prompt goes at 0.75 of its bound (the goal of 0.7 is reached)." in text


def test_a_slow_prompt_misses_its_goal(results: Results) -> None:
    slow = tuple(replace(s, ms=s.ms * 1.2) if not s.streams else s for s in results.samples)
    assert "the goal of 0.7 is missed" in report.section(replace(results, samples=slow))


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results


def test_ratios_to_a_peer_say_which_goals_are_reached(results: Results) -> None:
    peers = [Sample("vllm", *each) for each in ((1, 90, 22.5), (32, 90, 31.0), (0, 1055, 800.0))]
    both = replace(
        results,
        servers=(*results.servers, Server("vllm", 40.0, 1000.0)),
        samples=(*results.samples, *peers),
    )
    text = report.section(both)
    assert "*baton* over *vllm*: tokens/s at 1 **1.50** (goal at least 1.5: reached)" in text
    assert "tokens/s at 32 **1.00** (goal at least 1.3: missed)" in text
    assert "a prompt's TTFT **0.50** (goal at most 0.75: reached)" in text
    assert "start **0.10** (goal at most 0.2: reached)" in text
    assert "memory **0.90** (goal at most 0.5: missed)" in text
    assert "vllm" not in report.section(results)
