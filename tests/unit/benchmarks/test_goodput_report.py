"""The sweep's report, from results that were written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import goodput, goodput_plot, goodput_report
from benchmarks.arrivals import Load
from benchmarks.figures import Objectives, Record
from benchmarks.goodput_results import Results, Run
from benchmarks.goodput_sweep import SYSTEMS, Sweep

DISAGGREGATED, TWO, ONE = (system.name for system in SYSTEMS)
LOAD = Load(long_share=0.5, long_tokens=1500, answer_tokens=3, bound_s=3.45)
MACHINE = {
    "processor": "A CPU",
    "cores": 2,
    "python": "3.11",
    "revision": "abc1234",
    "load_average": 0.1,
}


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
        num_tokens=3,
        counted_by="usage",
        late_s=0.002,
    )


def run(system: str, round_: int, rate: float, *records: Record) -> Run:
    return Run(system, round_, rate, 4.0, 5.0, 0.5, records)


@pytest.fixture
def results() -> Results:
    """Two rates, three rounds: disaggregated has the better ITL and the worse TTFT."""
    runs = []
    for round_, more in enumerate((0.0, 0.1, 0.2)):
        for rate in (0.5, 1.0):
            runs += [
                run(DISAGGREGATED, round_, rate, request("chat", 1.0 + more, 0.05)),
                run(TWO, round_, rate, request("chat", 0.5, 0.3), request("long", 1.0, 0.1)),
                run(ONE, round_, rate, request("chat", 0.5, 0.3), request("long", 1.0, 0.3)),
            ]
    slow = replace(request("long", 3.45, 0.0, "overdue"), gaps_s=())
    runs.append(run(DISAGGREGATED, 0, 2.0, slow))
    runs.append(run(TWO, 0, 2.0, request("long", 1.0, 0.3, "failed")))
    runs.append(run(ONE, 0, 2.0, request("long", 1.0, 0.1)))
    return Results(
        begun_at="2030-01-01 00:00 UTC",
        machine=MACHINE,
        command="python -m benchmarks.goodput",
        seed=0,
        load=LOAD,
        objectives=Objectives(3.0, 0.15),
        systems=SYSTEMS,
        num_rounds=3,
        runs=tuple(runs),
    )


def cells(text: str, *beginning: str) -> list[str]:
    """The row of a table whose first cells are ``beginning``."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    (found,) = [row for row in rows if tuple(row[: len(beginning)]) == beginning]
    return found


def test_cells_are_medians_over_the_rounds(results: Results) -> None:
    row = cells(goodput_report.section(results, "p.svg"), "0.5", DISAGGREGATED)
    assert row[2:] == [
        "100% (100% to 100%)",
        "100%",
        "0.25",
        "1.10, 1.10 s",
        "-, - s",
        "50, 50 ms",
        "2",
        "0",
        "0",
    ]


def test_overdue_and_failed_requests_show(results: Results) -> None:
    text = goodput_report.section(results, "p.svg")
    assert cells(text, "2", DISAGGREGATED)[6:] == ["≥ 3.45, 3.45 s", "≥ -, - ms", "2", "1", "0"]
    assert cells(text, "2", TWO)[2:5] == ["0% (0% to 0%)", "0%", "0.00"]
    assert cells(text, "2", TWO)[-1] == "1"
    assert "compare lower bounds" in text
    whole = replace(results, runs=results.runs[:-3])
    assert "lower bounds." not in goodput_report.section(whole, "p.svg")


def test_the_fairest_of_the_colocated_ones_is_compared_with(results: Results) -> None:
    assert results.fairest([TWO, ONE]) == TWO
    assert results.fairest([ONE, TWO]) == TWO
    text = goodput_report.section(results, "p.svg")
    assert f"*{TWO}* met the objectives most often" in text
    assert cells(text, "TTFT of chats, p50")[1:] == ["2.20", "2.20", "-", "worse at 2"]
    assert cells(text, "ITL, p99")[1:] == ["0.17", "0.17", "-", "better at 2"]
    assert cells(text, "goodput")[1:] == ["1.00", "1.00", "-", "alike at 2"]


def test_the_highest_served_rate_is_before_the_first_that_is_missed(results: Results) -> None:
    assert goodput_report.highest_served_rate(results, DISAGGREGATED) == 1.0
    assert goodput_report.highest_served_rate(results, TWO) is None
    assert goodput_report.highest_served_rate(results, ONE) is None  # though 2/s went well
    assert f"*{DISAGGREGATED}* 1/s, *{TWO}* none" in goodput_report.section(results, "p.svg")


def test_a_machine_that_was_not_quiet_is_named_so(results: Results) -> None:
    busy = replace(results, machine={**MACHINE, "load_average": 1.7})
    assert "not quiet" in goodput_report.section(busy, "p.svg")
    assert "not quiet" not in goodput_report.section(results, "p.svg")


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "sub" / "r.json")
    assert Results.read(tmp_path / "sub" / "r.json") == results


def test_a_page_is_made_and_then_only_its_section_replaced(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "performance.md"
    goodput_report.into_page(page, "first\n")
    page.write_text(page.read_text() + "\n## More\n")
    goodput_report.into_page(page, "second\n")
    text = page.read_text()
    assert text.startswith("# Performance")
    assert text.endswith("## More\n")
    assert "second\n" + goodput_report.END in text
    assert "first" not in text


def test_a_page_without_marks_is_left_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Mine\n")
    with pytest.raises(ValueError, match="put them where results go"):
        goodput_report.into_page(page, "text\n")
    assert page.read_text() == "# Mine\n"


def test_the_plot_is_the_same_for_the_same_results(results: Results, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        goodput_plot.draw(results, tmp_path / name)
    svg = (tmp_path / "a.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    assert svg == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--window", "600"], "over the budget"),
        (["--window", "0"], "--window must be over 0"),
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
    sweep = Sweep(SYSTEMS, LOAD, (1.0,), 10.0, 2, 0, 600.0, "model")
    assert sweep.plan(0) == sweep.plan(0)
    assert sweep.plan(0) != sweep.plan(1)


@pytest.mark.parametrize("extra", [[], ["--quick"]])
def test_the_defaults_are_within_their_budgets(
    extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sweep] = []

    class Enough(Exception):
        pass

    def instead(sweep: Sweep, *_: object, **__: object) -> Results:
        asked.append(sweep)
        raise Enough

    monkeypatch.setattr(goodput, "_run", instead)
    with pytest.raises(Enough):
        goodput.main(extra)
    assert asked[0].longest_round_s <= asked[0].budget_s <= (120.0 if extra else 720.0)
