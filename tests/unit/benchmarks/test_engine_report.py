"""The engine's report, from samples that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.engine import report
from benchmarks.engine.results import Bound, Outside, Results, Sample, Server
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


def test_the_engines_own_products_are_told_beside_the_bound(results: Results) -> None:
    assert "own products" not in report.section(results)
    own = tuple(
        replace(each, own_decode_ms={"1": 7.5, "32": 12.4}, own_prompt_ms=280.0)
        for each in results.bounds
    )
    text = report.section(replace(results, bounds=own))
    assert (
        "The engine's own alone take 7.5 and 12.4 ms, and 280 for the prompt: beside "
        "those a step takes 2.00 and 2.50, and a prompt goes at 0.70."
    ) in text
    assert "A step at 1 takes 1.50 of its bound (the goal of 1.5 is reached)." in text


def test_curves_are_beside_whichever_products_are_faster() -> None:
    faster = replace(
        bound(10.0), own_decode_ms={"1": 7.5, "32": 22.0}, own_prompt_ms=280.0
    ).faster()
    assert (faster.decode_ms, faster.prompt_ms) == ({"1": 7.5, "32": 20.0}, 280.0)
    assert faster.packed.endswith("whichever is faster")


def test_a_slow_prompt_misses_its_goal(results: Results) -> None:
    slow = tuple(replace(s, ms=s.ms * 1.2) if not s.streams else s for s in results.samples)
    assert "the goal of 0.7 is missed" in report.section(replace(results, samples=slow))


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == results


def with_peer(results: Results, *starts: Server, step_32_ms: float = 31.0) -> Results:
    times = ((1, 90, 22.5), (32, 90, step_32_ms), (0, 1055, 800.0))
    peers = [Sample("vllm", *each) for each in times]
    return replace(
        results,
        servers=(*results.servers, *starts),
        samples=(*results.samples, *peers),
    )


def test_ratios_to_a_peer_say_which_goals_are_reached(results: Results) -> None:
    text = report.section(with_peer(results, Server("vllm", 40.0, 1000.0, "9.8")))
    assert "|  | baton | vllm | ratio | goal |  |" in text
    assert "| tokens/s at 1 | 67 | 44 | 1.50 | ≥ 1.5 | reached |" in text
    assert "| tokens/s at 32 | 1,032 | 1,032 | 1.00 | ≥ 1.3 | missed |" in text
    assert "| a prompt's TTFT (ms) | 400 | 800 | 0.50 | ≤ 0.75 | reached |" in text
    assert "| start (s) | 4.0 | 40.0 | 0.10 | ≤ 0.2 | reached |" in text
    assert "| memory (MB) | 900 | 1,000 | 0.90 | ≤ 0.5 | missed |" in text
    assert "Missed beside *vllm*: tokens/s at 32, memory (MB); where the time" in text
    assert "| vllm (9.8) | 40.0 |" in text
    assert "vllm" not in report.section(results)


def test_a_ratio_that_is_shown_as_its_goal_reaches_it(results: Results) -> None:
    text = report.section(with_peer(results, Server("vllm", 4 / 0.2049, 4000.0), step_32_ms=40.2))
    assert "| start (s) | 4.0 | 19.5 | 0.20 | ≤ 0.2 | reached |" in text
    assert "| tokens/s at 32 | 1,032 | 796 | 1.30 | ≥ 1.3 | reached |" in text


def test_starts_and_memory_are_medians_over_the_rounds(results: Results) -> None:
    starts = [Server("vllm", start_s, 4000.0) for start_s in (90.0, 20.0, 30.0)]
    text = report.section(with_peer(results, *starts, step_32_ms=62.0))
    assert "| start (s) | 4.0 | 30.0 | 0.13 | ≤ 0.2 | reached |" in text
    assert "No goal is missed." in text
    assert text.count("| vllm | 30.0 | 4,000 |") == 1


def test_a_peer_with_4_bits_is_beside_the_baton_with_4_bits(results: Results) -> None:
    both = replace(
        results,
        servers=(*results.servers, Server("baton int4", 4.0, 600.0), Server("llamacpp", 2.0, 300)),
        samples=(
            *results.samples,
            *(Sample("baton int4", *each) for each in ((1, 90, 10.0), (32, 90, 40.0), (0, 90, 4))),
            *(Sample("llamacpp", *each) for each in ((1, 90, 9.0), (32, 90, 79.0), (0, 90, 8))),
        ),
    )
    text = report.section(both)
    assert "|  | baton int4 | llamacpp | ratio | goal |  |" in text
    assert "| tokens/s at 1 | 100 | 111 | 0.90 | ≥ 0.8 | reached |" in text
    assert "| tokens/s at 32 | 800 | 405 | 1.98 | ≥ 2 | missed |" in text
    assert "| start (s) | 4.0 | 2.0 | 2.00 |  |  |" in text


def test_what_is_outside_the_model_has_a_goal(results: Results) -> None:
    outsides = [
        Outside(sampling, 32, 30.0, 29.0, draw_ms, outside_ms)
        for sampling, draw_ms, outside_ms in (
            ("greedily", 0.2, 0.9),
            ("greedily", 0.3, 1.0),
            ("greedily", 0.4, 1.4),
            ("at temperature 1", 1.5, 2.0),
        )
    ]
    text = report.section(replace(results, outsides=tuple(outsides)))
    assert "a step at 32 takes 1.00 ms greedily (0.30 of them for the draw: reached);" in text
    assert "2.00 ms at temperature 1 (1.50 of them for the draw: missed)" in text
    assert "Besides the model" not in report.section(results)


def test_results_with_peers_survive_their_file(results: Results, tmp_path: Path) -> None:
    full = replace(
        with_peer(results, Server("vllm", 40.0, 1000.0, "9.8")),
        outsides=(Outside("greedily", 32, 30.0, 29.0, 0.2, 1.0),),
        kv_tokens=46_603,
    )
    full.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == full
    assert "room for the KV of 46,603 tokens" in report.section(full)
