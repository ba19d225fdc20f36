"""Where local prefill is slower, from samples that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import local_prefill_report
from benchmarks.local_prefill_report import APART, LOCAL, Results, Sample, delays
from benchmarks.measured import Measured

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


def samples(num_streams: int, local_ms: dict[int, tuple[float, ...]]) -> list[Sample]:
    """Apart, the second token always comes after 100 ms."""
    return [
        Sample(way, num_streams, length, second_ms - 20, second_ms, 30.0 + 40 * (way == LOCAL))
        for length, times in local_ms.items()
        for time in times
        for way, second_ms in ((APART, 100.0), (LOCAL, time))
    ]


@pytest.fixture
def results() -> Results:
    idle = samples(0, {16: (50, 60, 500), 64: (100, 100, 100), 256: (90, 110, 120)})
    busy = samples(8, {16: (101, 102, 1), 64: (50, 50, 50), 256: (50, 50, 50)})
    return Results(MEASURED, "float32", 3, 256, (*idle, *busy))


def test_delays_are_those_of_the_medians(results: Results) -> None:
    assert delays(results, 0) == {16: -40, 64: 0, 256: 10}
    assert delays(results, 8) == {16: 1, 64: -50, 256: -50}


def test_the_section_says_what_the_figures_say(results: Results) -> None:
    text = local_prefill_report.section(results)
    assert (
        "On an idle server local prefill brings the second token later at 256 uncached tokens "
        "(by 10 ms at most), no later at the other lengths."
    ) in text
    assert "Beside 8 streams local prefill brings the second token later at 16 unc" in text
    assert "at 256 tokens the others' longest pause is 30 ms apart and 70 ms local" in text
    assert "| 0 | 16 | 80 | 40 | 100 | 60 | - | - |" in text
    assert "| 8 | 16 | 80 | 81 | 100 | 101 | 30 | 70 |" in text
    faster = replace(results, samples=tuple(samples(8, {16: (50.0,)})))
    assert "Beside 8 streams local prefill brings the second token no later at any length" in (
        local_prefill_report.section(faster)
    )


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="no results of this version"):
        Results.read(tmp_path / "r.json")
