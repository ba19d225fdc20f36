"""The reports of curves and of quantized weights, from results that were written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engine import curves_report, quantized
from benchmarks.engine.curves_report import Memory, Step
from benchmarks.engine.quantized import Sample
from benchmarks.engine.results import Bound
from benchmarks.measured import Measured

MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)


@pytest.fixture
def curves() -> curves_report.Results:
    """KV of 1,000 bytes a token, read at 1 GB/s: 1 ms for 1,000 tokens."""
    steps = [Step(1, 256, 10.0), Step(1, 4000, 28.0), Step(8, 256, 30.0), Step(8, 4000, 96.0)]
    steps += [Step(2, 256, 11.0)]
    return curves_report.Results(
        measured=MEASURED,
        bound=Bound(2, {"1": 10.0, "2": 10.5, "8": 16.0}, 512, 300.0, 1.0),
        token_bytes=1000,
        block_bytes=16_000,
        steps=tuple(steps),
        memory=(Memory(100, 400.0), Memory(200, 401.6)),
    )


def test_bound_is_the_products_and_the_kv_that_is_read(curves: curves_report.Results) -> None:
    assert curves.bound_ms(1, 4000) == pytest.approx(14.0)
    text = curves_report.section(curves, Path("a/curves.svg"))
    assert "| 1 | 4,000 | 28.0 | 14.0 | 2.00 |" in text
    assert "| 8 | 4,000 | 96.0 | 48.0 | 2.00 |" in text
    assert "![Steps and memory](benchmarks/curves.svg)" in text


def test_same_results_give_the_same_plot(curves: curves_report.Results, tmp_path: Path) -> None:
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    for path in (first, second):
        curves_report.draw(curves, path)
    assert first.read_bytes() == second.read_bytes()
    assert b"8 streams" in first.read_bytes()


def test_curves_survive_their_file(curves: curves_report.Results, tmp_path: Path) -> None:
    curves.write(tmp_path / "r.json")
    assert curves_report.Results.read(tmp_path / "r.json") == curves


def sample(kind: str, perplexity: float, step_ms: float) -> Sample:
    steps = {"1": step_ms, "8": 2 * step_ms, "32": 4 * step_ms}
    return Sample(kind, perplexity, 5000, steps, 300.0, 500.0)


def test_quantized_weights_are_compared_with_whole_ones(tmp_path: Path) -> None:
    samples = [sample("none", 20.0, ms) for ms in (9.0, 10.0, 30.0)]
    samples += [sample("int8", 20.1, 8.0)] * 3 + [sample("int4", 22.0, 5.0)] * 3
    results = quantized.Results(MEASURED, tuple(samples))
    results.write(tmp_path / "r.json")
    text = quantized.report(quantized.Results.read(tmp_path / "r.json"))
    assert "| bfloat16 | 20.00 (+0.0%) | 10.0 | 20.0 | 40.0 | 300 | 500 |" in text
    assert "| int8 | 20.10 (+0.5%) | 8.0 |" in text
    assert "| int4 | 22.00 (+10.0%) | 5.0 |" in text
    assert "medians of 3 rounds" in text
