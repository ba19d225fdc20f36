"""The sweep's report, from results that were written down."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from baton.config import BatonConfig
from benchmarks import goodput, goodput_plot, goodput_report, page
from benchmarks.arrivals import Load
from benchmarks.figures import Objectives, Record
from benchmarks.goodput_report import compare
from benchmarks.goodput_results import Results, Run, RunFigures, requests_beside
from benchmarks.goodput_sweep import SYSTEMS, Sweep
from benchmarks.measured import Measured

THREE = tuple(system for system in SYSTEMS if system.name != "colocated-2-128")
"""What was kept before there were small chunks."""
DISAGGREGATED, TWO, ONE = (system.name for system in THREE)
SMALL = "colocated-2-128"
LOAD = Load(long_share=0.5, long_tokens=1500, answer_tokens=3, bound_s=3.45)
OBJECTIVES = Objectives(3.0, 0.15)
MEASURED = Measured("2030-01-01 00:00 UTC", "cmd", "abc1234", "A CPU", 2, 0, "3.11.7", 0.1)
NUM_ROUNDS = 4


def request(kind: str, ttft_s: float, itl_s: float, outcome: str = "whole") -> Record:
    return Record(
        kind=kind,
        began_at_s=0.0,
        outcome=outcome,  # type: ignore[arg-type]
        ttft_s=ttft_s,
        gaps_s=(itl_s, itl_s),
        e2e_s=2.0,
        num_prompt_tokens=100,
        num_cached_tokens=0,
        num_tokens=30,
        counted_by="usage",
        late_s=0.002,
    )


def run(system: str, round_: int, rate: float, *records: Record) -> RunFigures:
    return RunFigures.of(Run(system, round_, rate, 4.0, 5.0, 0.5, records), OBJECTIVES)


@pytest.fixture
def results() -> Results:
    """Two rates, four rounds: disaggregated has the better ITL and the worse TTFT."""
    runs = []
    for round_ in range(NUM_ROUNDS):
        more = 0.1 * round_
        for rate in (0.5, 1.0):
            runs += [
                run(DISAGGREGATED, round_, rate, request("chat", 1.0 + more, 0.05)),
                run(TWO, round_, rate, request("chat", 0.5, 0.3), request("long", 1.0, 0.1)),
                run(ONE, round_, rate, request("chat", 0.5, 0.3), request("long", 1.0, 0.3)),
            ]
        slow = replace(request("long", 3.45, 0.0, "overdue"), gaps_s=())
        runs.append(run(DISAGGREGATED, round_, 2.0, slow))
        runs.append(run(TWO, round_, 2.0, request("long", 4.0, 0.3, "failed")))
        runs.append(run(ONE, round_, 2.0, request("long", 4.0, 0.1)))
    return Results(
        measured=MEASURED,
        seed=0,
        load=LOAD,
        objectives=OBJECTIVES,
        systems=THREE,
        num_rounds=NUM_ROUNDS,
        client_cores=0.1,
        max_late_s=0.002,
        runs=tuple(runs),
    )


def of_rounds(disaggregated: list[float], colocated: list[float], figure: str) -> Results:
    """Where nothing but one figure differs."""
    records = request("chat", 0.5, 0.1), request("long", 1.0, 0.1)
    runs = []
    for name, values in ((DISAGGREGATED, disaggregated), (TWO, colocated), (ONE, colocated)):
        for round_, value in enumerate(values):
            runs.append(replace(run(name, round_, 1.0, *records), **{figure: value}))
    num = len(disaggregated)
    return Results(MEASURED, 0, LOAD, OBJECTIVES, THREE, num, 0.1, 0.0, tuple(runs))


def cells(text: str, rate: str, row: str) -> list[str]:
    """Of the named row of the table of a rate."""
    table = text.partition(f"| {rate} requests/s offered, ")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    (found,) = [each for each in rows if each[:1] == [row]]
    return found[1:]


def test_cells_are_medians_over_the_rounds_with_their_range(results: Results) -> None:
    text = goodput_report.section(results, "p.svg")
    assert cells(text, "0.5", "TTFT p50 of short chats") == [
        "1.15 s (1.00 to 1.30)",
        "0.50 s (0.50 to 0.50)",
        "0.50 s (0.50 to 0.50)",
        "worse",
    ]
    assert cells(text, "0.5", "goodput") == [
        *["0.20/s (0.20 to 0.20)"] * 2,
        "0.00/s (0.00 to 0.00)",
        "no difference seen",
    ]
    assert cells(text, "0.5", "good requests") == [
        *("100% (100 to 100)", "50% (50 to 50)", "0% (0 to 0)"),
        "better",
    ]
    assert cells(text, "0.5", "ITL p99")[0] == "50 ms (50 to 50)"
    assert cells(text, "0.5", "TTFT p50 of long documents")[0] == "-"


def test_overdue_and_failed_requests_show(results: Results) -> None:
    text = goodput_report.section(results, "p.svg")
    assert cells(text, "2", "TTFT p50 of long documents")[0] == "≥ 3.45 s (3.45 to 3.45)"
    assert cells(text, "2", "overdue")[:3] == ["4", "0", "0"]
    assert cells(text, "2", "failed")[:3] == ["0", "4", "0"]


def test_each_system_says_which_objective_its_requests_missed(results: Results) -> None:
    text = goodput_report.section(results, "p.svg")
    assert cells(text, "0.5", "missed TTFT")[:3] == ["0", "0", "0"]
    assert cells(text, "0.5", "missed ITL")[:3] == ["0", "4", "8"]
    assert cells(text, "2", "missed TTFT")[:3] == ["4", "0", "4"], "a failed one misses neither"
    assert (
        f"*{DISAGGREGATED}* 4 (4 by TTFT, 0 by ITL), *{TWO}* 12 (0 by TTFT, 8 by ITL), "
        f"*{ONE}* 20 (4 by TTFT, 16 by ITL)."
    ) in text


def test_the_fairest_of_the_colocated_ones_is_compared_with(results: Results) -> None:
    assert results.fairest([TWO, ONE]) == TWO
    assert results.fairest([ONE, TWO]) == TWO
    text = goodput_report.section(results, "p.svg")
    assert f"*{TWO}* had the most good requests" in text
    assert f"{DISAGGREGATED} against {TWO} |" in text


@pytest.mark.parametrize(
    ("figure", "one", "other", "verdict"),
    [
        ("itl_p99_s", [1, 2, 3, 4], [5, 6, 7, 8], "better"),
        ("itl_p99_s", [5, 6, 7, 8], [1, 2, 3, 4], "worse"),
        ("itl_p99_s", [1, 1, 1, 5], [5, 6, 7, 8], "unseen"),
        ("itl_p99_s", [5, 5, 5, 5], [5, 5, 5, 5], "unseen"),
        ("itl_p99_s", [1, 2, 3], [5, 6, 7], "unseen"),
        ("itl_p99_s", [1, 2, 3, None], [5, 6, 7, 8], "unseen"),
        ("goodput_per_s", [1, 2, 3, 4], [5, 6, 7, 8], "worse"),
        ("good_share_on_average", [1, 2, 3, 4], [5, 6, 7, 8], "worse"),
        ("tokens_per_s", [5, 6, 7, 8], [1, 2, 3, 4], "better"),
        ("tokens_per_s", [4, 6, 7, 8], [1, 2, 3, 4], "unseen"),
    ],
)
def test_a_difference_is_claimed_only_where_the_ranges_of_enough_rounds_part(
    figure: str, one: list[float], other: list[float], verdict: str
) -> None:
    assert compare(of_rounds(one, other, figure), 1.0, figure, DISAGGREGATED, TWO) == verdict


def test_a_lower_bound_is_never_the_shorter_time() -> None:
    figure = "chat_ttft_p50_s"
    results = of_rounds([1, 2, 3, 4], [5, 6, 7, 8], figure)
    for name, verdict in ((DISAGGREGATED, "unseen"), (TWO, "better")):
        runs = [replace(run, num_overdue=int(run.system == name)) for run in results.runs]
        bounded = replace(results, runs=tuple(runs))
        assert compare(bounded, 1.0, figure, DISAGGREGATED, TWO) == verdict


def test_sentences_say_what_is_better_and_what_is_worse(results: Results) -> None:
    text = goodput_report.section(results, "p.svg")
    assert (
        f"At 0.5/s *{DISAGGREGATED}* is, against *{TWO}*, **better** in good requests (100% "
        "against 50%), good by TPOT (100% against 50%), ITL p50 (50 ms against 100 ms) and ITL p99 "
        "(50 ms against 300 ms), and **worse** in TTFT p50 of short chats (1.15 s against 0.50 s), "
        "TTFT p90 of short chats (1.15 s against 0.50 s) and tokens per second (6 against 12). No "
        "difference is seen in the other figures.\n"
    ) in text
    same = of_rounds([1, 1, 1, 1], [1, 1, 1, 1], "itl_p50_s")
    assert (
        f"At 1/s no difference between *{DISAGGREGATED}* and *{TWO}* is seen in any figure.\n"
    ) in goodput_report.section(same, "p.svg")


@pytest.mark.parametrize(
    ("figure", "one", "other", "words"),
    [
        (
            "good_share_on_average",
            [0.5, 0.75, 0.75, 1],
            [1, 1, 1, 1],
            "worse in good by TPOT (75% against 100%)",
        ),
        ("itl_p99_s", [1, 2, 2, 3], [1, 3, 3, 3], "better in ITL p99 (2000 ms against 3000 ms)"),
    ],
)
def test_medians_are_told_where_no_difference_is_seen(
    figure: str, one: list[float], other: list[float], words: str
) -> None:
    results = of_rounds(one, other, figure)
    assert (
        f"is seen in any figure; there the medians of *{DISAGGREGATED}* are {words}.\n"
    ) in goodput_report.section(results, "p.svg")


def test_no_median_that_is_a_lower_bound_is_told() -> None:
    results = of_rounds([1, 2, 2, 3], [1, 3, 3, 3], "itl_p99_s")
    runs = [replace(run, num_overdue=int(run.system == TWO)) for run in results.runs]
    text = goodput_report.section(replace(results, runs=tuple(runs)), "p.svg")
    assert "is seen in any figure.\n" in text


def test_chunks_are_named_and_a_baseline_without_small_ones_is_said_to_be_weak(
    results: Results,
) -> None:
    text = goodput_report.section(results, "p.svg")
    assert "`engine.max_num_batched_tokens`, what a worker computes in one step, is 512 in all" in (
        text
    )
    assert "No colocated system here has smaller chunks" in text
    small = [replace(run, system=SMALL) for run in results.runs if run.system == TWO]
    four = replace(results, systems=SYSTEMS, runs=(*results.runs, *small))
    text = goodput_report.section(four, "p.svg")
    arguments = "baton serve --prefill 0 --decode 2"
    assert f"*{TWO}* is `{arguments}`; " in text
    assert f"*{SMALL}* is `{arguments}` with `engine.max_num_batched_tokens: 128`; " in text
    assert "is 512 in the others. Where one" in text
    assert "No colocated system here" not in text


def test_small_chunks_are_compared_with_where_they_serve_more_requests_well(
    results: Results,
) -> None:
    good = request("chat", 0.5, 0.1), request("long", 1.0, 0.1)
    small = [run(SMALL, round_, 0.5, *good, *good) for round_ in range(NUM_ROUNDS)]
    four = replace(results, systems=SYSTEMS, runs=(*results.runs, *small))
    text = goodput_report.section(four, "p.svg")
    assert f"*{SMALL}* had the most good requests" in text
    assert f"{DISAGGREGATED} against {SMALL} |" in text


def test_each_system_is_served_with_its_own_chunks_and_all_with_the_same_memory() -> None:
    engines = {system.name: system.settings["engine"] for system in SYSTEMS}
    assert [each["max_num_batched_tokens"] for each in engines.values()] == [512, 512, 128, 512]
    for system in SYSTEMS:
        config = BatonConfig.model_validate(system.settings)
        assert config.engine.max_num_batched_tokens == system.max_num_batched_tokens
        num_workers = sum(map(int, system.arguments[1::2]))
        assert config.engine.kv_cache_bytes * num_workers == 1024 * 1024 * 1024


@pytest.mark.parametrize(("duration_s", "took_s"), [(5.0, 5.0), (3.0, 4.0)])
def test_goodput_and_tokens_are_over_the_window_and_until_the_last_request_was_over(
    duration_s: float, took_s: float
) -> None:
    records = request("chat", 0.5, 0.1), request("chat", 0.5, 0.3)
    figures = RunFigures.of(Run(TWO, 0, 0.5, 4.0, duration_s, 0.5, records), OBJECTIVES)
    assert (figures.num_good, figures.num_tokens, figures.took_s) == (1, 60, took_s)
    assert figures.goodput_per_s == pytest.approx(1 / took_s, abs=1e-6)
    assert figures.tokens_per_s == pytest.approx(60 / took_s, abs=1e-6)


@pytest.mark.skipif(not goodput.KEPT.exists(), reason="needs results kept in docs/benchmarks")
def test_no_kept_goodput_is_more_than_was_served_or_offered() -> None:
    kept = Results.read(goodput.KEPT)
    for run_ in kept.runs:
        assert run_.goodput_per_s * kept.load.answer_tokens <= run_.tokens_per_s + 1e-3
        assert run_.goodput_per_s <= run_.rate_per_s + 1e-6


def test_chance_parts_as_many_ranges_as_the_report_says() -> None:
    ranks = set(range(8))
    halves = [(set(one), ranks - set(one)) for one in combinations(ranks, 4)]
    parted = sum(max(a) < min(b) or max(b) < min(a) for a, b in halves)
    assert goodput_report.parted_by_chance(4) == pytest.approx(parted / len(halves))
    four = of_rounds([1, 2, 3, 4], [5, 6, 7, 8], "itl_p99_s")
    assert "by chance in 2.9% of comparisons" in goodput_report.section(four, "p.svg")


def test_of_too_few_rounds_nothing_is_said() -> None:
    text = goodput_report.section(of_rounds([1, 1, 1], [5, 5, 5], "itl_p99_s"), "p.svg")
    assert "No difference is claimed: that takes 4 rounds" in text
    assert cells(text, "1", "ITL p99")[-1] == ""
    assert "At 1/s" not in text


def test_the_highest_served_rate_is_before_the_first_that_is_missed(results: Results) -> None:
    assert goodput_report.highest_served_rate(results, DISAGGREGATED) == 1.0
    assert goodput_report.highest_served_rate(results, TWO) is None
    good = [replace(run, good_share=1.0 if run.rate_per_s != 1 else 0.5) for run in results.runs]
    gap = replace(results, runs=tuple(good))
    assert goodput_report.highest_served_rate(gap, ONE) == 0.5, "though 2/s went well"
    assert f"*{DISAGGREGATED}* 1/s, *{TWO}* none" in goodput_report.section(results, "p.svg")


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "sub" / "r.json")
    assert Results.read(tmp_path / "sub" / "r.json") == results


def test_the_report_makes_its_figures_anew_of_the_requests(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    one = Run(TWO, 0, 0.5, 4.0, 5.0, 0.5, (request("chat", 0.5, 0.1),))
    of_another_version = replace(RunFigures.of(one, OBJECTIVES), goodput_per_s=9.0)
    Results(MEASURED, 0, LOAD, OBJECTIVES, THREE, 1, 0.1, 0.0, runs=(of_another_version,)).write(
        file
    )
    page.write_json(requests_beside(file), {"runs": [one.to_json()]})
    assert Results.of_requests(file).runs == (RunFigures.of(one, OBJECTIVES),)
    requests_beside(file).unlink()
    with pytest.raises(FileNotFoundError, match=r"r-requests\.json"):
        Results.of_requests(file)


def test_the_plot_is_the_same_for_the_same_results(results: Results, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        goodput_plot.draw(results, tmp_path / name)
    svg = (tmp_path / "a.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    assert svg == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests", "600"], "over the budget"),
        (["--requests", "0"], "--requests must be over 0"),
        (["--rates", "1", "0"], "--rates must be over 0"),
        (["--report", "--results", "/nowhere/r.json"], "/nowhere/r.json"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert goodput.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_another_programs_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"runs": []}')
    assert goodput.main(["--report", "--results", str(tmp_path / "r.json")]) == 2


def test_every_round_has_the_same_plan_for_all_and_another_than_the_next() -> None:
    sweep = Sweep(SYSTEMS, LOAD, (1.0,), 10, 2, 0, 600.0, "model")
    assert sweep.plan(0) == sweep.plan(0)
    assert sweep.plan(0) != sweep.plan(1)


def asked_for(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    asked: list[Sweep] = []

    class Enough(Exception):
        pass

    def instead(sweep: Sweep, *_: object) -> None:
        asked.append(sweep)
        raise Enough

    monkeypatch.setattr(goodput, "_run", instead)
    with pytest.raises(Enough):
        goodput.main(list(arguments))
    return asked[0]


def test_the_default_sweep_suffices_for_claims_within_25_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = asked_for(monkeypatch=monkeypatch)
    assert sweep.num_rounds * sweep.longest_round_s <= sweep.budget_s <= 25 * 60
    assert sweep.num_rounds >= goodput_report.MIN_ROUNDS
    assert sweep.num_rounds * sweep.num_requests >= 60
    assert goodput_report.parted_by_chance(sweep.num_rounds) < 0.01


def test_a_quick_sweep_takes_three_minutes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = asked_for("--quick", monkeypatch=monkeypatch)
    assert sweep.num_rounds * sweep.longest_round_s <= sweep.budget_s <= 3 * 60
    assert asked_for("--quick", "--requests", "7", monkeypatch=monkeypatch).num_requests == 7
