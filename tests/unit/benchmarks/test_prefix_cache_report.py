"""What repeated prompts took, from samples that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import prefix_cache_report
from benchmarks.measured import Measured
from benchmarks.prefix_cache_report import APART, COLOCATED, Results, Sample

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


def samples(way: str, first_ms: tuple[float, ...], again_ms: tuple[float, ...]) -> list[Sample]:
    """Of a request 4 ms are spent outside of its timeline."""
    return [
        Sample(
            way=way,
            prompt=number,
            repeat=repeat,
            num_tokens=1000,
            num_cached_tokens=992 * repeat,
            prefill_worker="prefill-0" if way == APART and not repeat else None,
            ttft_ms=ttft_ms,
            parts_ms={"queue": 1.0, "route": 2.0, "room": 3.0, "prefill": ttft_ms - 10},
        )
        for repeat, times in enumerate((first_ms, again_ms))
        for number, ttft_ms in enumerate(times)
    ]


@pytest.fixture
def results() -> Results:
    apart = samples(APART, (900, 1000, 5000), (50, 60, 70))
    colocated = samples(COLOCATED, (400, 400, 400), (61, 61, 30))
    return Results(MEASURED, "float32", 3, 1, (*apart, *colocated))


def test_the_ratio_is_that_of_the_medians(results: Results) -> None:
    assert results.ratio(APART) == pytest.approx(0.06)
    assert results.ratio(COLOCATED) == pytest.approx(61 / 400)


def test_the_section_says_what_the_figures_say(results: Results) -> None:
    text = prefix_cache_report.section(results)
    assert "Each of 3 prompts of 1,000 tokens (dtype float32) is asked once and then 1" in text
    assert "| disaggregated | 1000 (900 to 5000) | 60 (50 to 70) | 0.060 | 992 | decode |" in text
    assert "| disaggregated | 1.0 | 2.0 | 3.0 | 50.0 | 4.0 |" in text
    assert "*disaggregated*: 0.060 of the first time (the goal of 0.15 is reached)." in text
    assert "*colocated*: 0.152 of the first time (the goal of 0.15 is missed)." in text


def test_the_goal_is_reached_at_its_very_bound(results: Results) -> None:
    exact = replace(results, samples=tuple(samples(APART, (1000.0,), (150.0,))))
    assert "(the goal of 0.15 is reached)" in prefix_cache_report.section(exact)


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="no results of this version"):
        Results.read(tmp_path / "r.json")
