"""Goodput of disaggregated and colocated Baton on this machine, by offered rate.

    .venv/bin/python -m benchmarks.goodput              # the sweep, at most 25 minutes
    .venv/bin/python -m benchmarks.goodput --quick      # a first impression, at most 3
    .venv/bin/python -m benchmarks.goodput --report     # results into docs/, runs nothing

Why locust, and why a plan: the load is sent by a locust process (open_loop.py), so that
one client measures here and in locustfile.py. locust's own users are closed-loop, though:
each waits for its answer, so a slow server is asked less, and its queue never shows. The
one user there starts a greenlet at each moment of a plan that was written down before,
the same for every system.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from baton.config import DEFAULT_MODEL
from baton.errors import BatonError
from benchmarks import goodput_plot, goodput_report, page
from benchmarks.arrivals import Load
from benchmarks.figures import Objectives
from benchmarks.goodput_results import Results, Run, RunFigures, requests_beside
from benchmarks.goodput_sweep import SYSTEMS, Sweep, run_sweep
from benchmarks.measured import Measured, measured_now

SECTION = "goodput"
KEPT, PLOT = page.KEPT / "goodput.json", page.KEPT / "goodput.svg"
_RESULTS = page.RESULTS / "goodput.json"

_QUICK = {"rates": [1.0, 2.0], "requests": 8, "rounds": 1, "budget": 180.0, "answer_tokens": 24}
"""Defaults of --quick; what is given besides wins."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the sweep failed, 2 it cannot be run as asked."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.quick:
        parser.set_defaults(**_QUICK)
        arguments = parser.parse_args(argv)
    try:
        if arguments.report:
            _publish(arguments.results)
            return 0
        sweep, objectives = _sweep(arguments), _objectives(arguments)
        if sweep.longest_round_s > sweep.budget_s:
            print(_too_long(sweep), file=sys.stderr)
            return 2
        measured = measured_now(shlex.join(["python", "-m", "benchmarks.goodput", *argv]))
        num_rounds, runs = _run(sweep, measured)
    except BatonError as error:
        print(f"goodput: {error.message}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"goodput: {error}", file=sys.stderr)
        return 2
    _keep(_results(sweep, objectives, measured, num_rounds, runs), runs, arguments.results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput")
    add = parser.add_argument
    add("--quick", action="store_true", help="two rates, one round: at most three minutes")
    add("--report", action="store_true", help="write docs/performance.md from the requests kept")
    add("--results", type=Path, default=_RESULTS, metavar="FILE")
    add("--rates", type=float, nargs="+", default=[1.0, 2.0, 3.0], metavar="R")
    add("--requests", type=int, default=14, metavar="N", help="of a system, rate and round")
    add("--rounds", type=int, default=5, metavar="N", help="figures are medians over them")
    add(
        "--budget", type=float, default=1500.0, metavar="S", help="no round begins that may not fit"
    )
    add("--objective-ttft", type=float, default=3.0, metavar="S")
    add("--objective-itl", type=float, default=0.15, metavar="S", help="7 tokens/s: fluent reading")
    add("--objective-itl-percentile", type=float, default=99.0, metavar="P")
    add("--long-share", type=float, default=0.25, metavar="SHARE", help="of long prompts")
    add("--long-tokens", type=int, default=1500, metavar="N", help="1,530 with the chat's own")
    add("--answer-tokens", type=int, default=48, metavar="N")
    add("--seed", type=int, default=0, metavar="N")
    add("--model", default=DEFAULT_MODEL, metavar="PATH|NAME")
    return parser


def _objectives(arguments: argparse.Namespace) -> Objectives:
    return Objectives(
        arguments.objective_ttft, arguments.objective_itl, arguments.objective_itl_percentile
    )


def _sweep(arguments: argparse.Namespace) -> Sweep:
    """Raises ValueError for numbers that make no sense."""
    positive = ("requests", "rounds", "objective_ttft", "objective_itl", "long_tokens")
    for name in (*positive, "answer_tokens"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be over 0")
    if min(arguments.rates) <= 0 or not 0 <= arguments.long_share <= 1:
        raise ValueError("--rates must be over 0, and --long-share within 0 and 1")
    # Whoever takes longer has missed an objective on the way: one gap at least is too long.
    bound_s = arguments.objective_ttft + arguments.answer_tokens * arguments.objective_itl
    load = Load(arguments.long_share, arguments.long_tokens, arguments.answer_tokens, bound_s)
    return Sweep(
        systems=SYSTEMS,
        load=load,
        rates=tuple(arguments.rates),
        num_requests=arguments.requests,
        num_rounds=arguments.rounds,
        seed=arguments.seed,
        budget_s=arguments.budget,
        model=arguments.model,
    )


def _too_long(sweep: Sweep) -> str:
    return (
        f"goodput: one round may take {sweep.longest_round_s:.0f} s, which is over the budget of "
        f"{sweep.budget_s:.0f} s; use fewer --rates or --requests or a larger --budget"
    )


def _run(sweep: Sweep, measured: Measured) -> tuple[int, list[Run]]:
    print(
        f"{len(sweep.systems)} systems, rates {', '.join(f'{r:g}' for r in sweep.rates)}/s, "
        f"{sweep.num_rounds} rounds of at most {sweep.longest_round_s:.0f} s, "
        f"budget {sweep.budget_s:.0f} s; load average {measured.load_average}",
        flush=True,
    )
    return run_sweep(sweep, lambda line: print(line, flush=True))


def _results(
    sweep: Sweep, objectives: Objectives, measured: Measured, num_rounds: int, runs: list[Run]
) -> Results:
    client_cores = sum(run.client_cpu_s for run in runs) / sum(run.duration_s for run in runs)
    return Results(
        measured=measured,
        seed=sweep.seed,
        load=sweep.load,
        objectives=objectives,
        systems=sweep.systems,
        num_rounds=num_rounds,
        client_cores=round(client_cores, 4),
        max_late_s=max(record.late_s for run in runs for record in run.records),
        runs=tuple(RunFigures.of(run, objectives) for run in runs),
    )


def _keep(results: Results, runs: list[Run], path: Path) -> None:
    """Figures, every request, table and plot, side by side."""
    requests = requests_beside(path)
    plot, table = path.with_suffix(".svg"), path.with_suffix(".md")
    results.write(path)
    page.write_json(requests, {"runs": [run.to_json() for run in runs]})
    goodput_plot.draw(results, plot)
    table.write_text(goodput_report.section(results, plot.name) + "\n")
    print(table.read_text())
    print(f"written: {path}, {requests}, {table}, {plot}")


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    plot = PLOT.relative_to(page.PAGE.parent).as_posix()
    return goodput_report.section(Results.read(kept), plot)


def _publish(path: Path) -> None:
    page.expect_results(path, "benchmarks.goodput")
    results = Results.of_requests(path)
    results.write(KEPT)
    goodput_plot.draw(results, PLOT)
    page.into_page(SECTION, section())
    print(f"written: {page.PAGE}, {KEPT}, {PLOT}")


if __name__ == "__main__":
    sys.exit(main())
