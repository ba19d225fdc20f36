"""The sweep's report in Markdown: what was run, the table, and what is better and what worse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.goodput_results import Figure, Results, median

BEGIN, END = "<!-- goodput -->", "<!-- end of goodput -->"
_ALIKE = 0.1
"""Figures within this share of each other are called alike."""
_QUIET_LOAD = 0.5
_SERVED_SHARE = 0.9

PAGE = f"""# Performance

What Baton does on one machine, measured by commands that anybody can run again. The figures below
are written by those commands; none is typed by hand.

## Disaggregated and colocated, under the same load

```sh
make bench-goodput                      # the sweep: at most 12 minutes; ARGS="--quick" takes 2
.venv/bin/python -m benchmarks.goodput --report   # writes its results into this page
```

[benchmarks/README.md](../benchmarks/README.md) says how it measures and how to read it.

{BEGIN}
{END}
"""


@dataclass(frozen=True, slots=True)
class _Metric:
    name: str
    figure: Figure
    higher_is_better: bool = False
    kind: str | None = None


_METRICS = (
    _Metric("goodput", lambda f: f.goodput_per_s, higher_is_better=True),
    _Metric("TTFT of chats, p50", lambda f: f.ttft_s[50], kind="chat"),
    _Metric("TTFT of long prompts, p50", lambda f: f.ttft_s[50], kind="long"),
    _Metric("ITL, p50", lambda f: f.itl_s[50]),
    _Metric("ITL, p99", lambda f: f.itl_s[99]),
    _Metric("tokens/s", lambda f: f.tokens_per_s, higher_is_better=True),
)


def section(results: Results, plot: str) -> str:
    """Everything between the marks; ``plot`` is the image's path from the page."""
    parts = (
        _setting(results),
        _table(results),
        f"![goodput, TTFT and ITL by offered rate]({plot})",
        _comparison(results),
    )
    return "\n\n".join(parts) + "\n"


def into_page(page: Path, text: str) -> None:
    """Puts ``text`` between the page's marks; writes the whole page where there is none.

    Raises ValueError for a page without the marks.
    """
    old = page.read_text() if page.exists() else PAGE
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {BEGIN} and {END}; put them where results go")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def _setting(results: Results) -> str:
    machine, load, objectives = results.machine, results.load, results.objectives
    systems = "; ".join(
        f"*{each.name}* is `baton serve {' '.join(each.arguments)}`" for each in results.systems
    )
    runs = results.runs
    cpu = sum(run.client_cpu_s for run in runs) / sum(run.duration_s for run in runs)
    late = max(record.late_s for run in runs for record in run.records)
    busy = machine["load_average"]
    warning = (
        f" **The machine was not quiet before it began: load average {busy}.**"
        if busy > _QUIET_LOAD
        else ""
    )
    return (
        f"Measured {results.begun_at} at `{machine['revision']}` with `{results.command}` on "
        f"{machine['cores']} cores of {machine['processor']}, Python {machine['python']}.{warning} "
        f"{systems}; all have the same memory for KV. "
        f"{load.long_share:.0%} of the requests are prompts of about {load.long_tokens:,} tokens, "
        "each another one; the others are short chats; all are streamed and answered with "
        f"{load.answer_tokens} tokens. Each rate was offered for {runs[0].window_s:g} s in each of "
        f"{results.num_rounds} rounds; cells are medians over the rounds. A request is *good* if "
        f"its first token came within {objectives.ttft_s:g} s and its ITL at p"
        f"{objectives.itl_percentile:g} is within {1000 * objectives.itl_s:g} ms; after "
        f"{load.bound_s:.1f} s it is given up as overdue, and its figures till then count "
        "(so they are lower bounds in rows with overdue requests, marked ≥). The load's own "
        f"process took {cpu:.0%} of a core on average, and sent no request more than "
        f"{1000 * late:.0f} ms late."
    )


# ---------------------------------------------------------------------- the table


def _table(results: Results) -> str:
    heads = (
        *("offered/s", "system", "good (least to most)", "good by TPOT", "goodput/s"),
        *("TTFT of chats p50, p90", "TTFT of long p50, p90", "ITL p50, p99", "tokens/s"),
        *("overdue", "failed"),
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for rate in results.rates:
        for system in results.systems:
            lines.append("| " + " | ".join(_cells(results, rate, system.name)) + " |")
    return "\n".join(lines)


def _cells(results: Results, rate: float, system: str) -> Iterator[str]:
    def each(figure: Figure) -> list[float]:
        return results.each(system, rate, figure)

    shares = each(lambda f: f.good_share)
    overdue, failed = sum(each(_num_overdue)), sum(each(_num_failed))
    mark = "≥ " if overdue else ""
    yield f"{rate:g}"
    yield system
    yield f"{_number(median(shares), '.0%')} ({min(shares):.0%} to {max(shares):.0%})"
    yield _number(median(each(lambda f: f.good_share_on_average)), ".0%")
    yield _number(median(each(lambda f: f.goodput_per_s)), ".2f")
    for kind in ("chat", "long"):
        pair = [results.median(system, rate, _ttft(percent), kind) for percent in (50, 90)]
        yield mark + ", ".join(_number(value, ".2f") for value in pair) + " s"
    pair = [results.median(system, rate, _itl(percent)) for percent in (50, 99)]
    yield mark + ", ".join(_milliseconds(value) for value in pair) + " ms"
    yield _number(median(each(lambda f: f.tokens_per_s)), ".0f")
    yield f"{overdue:.0f}"
    yield f"{failed:.0f}"


def _num_overdue(figures: Figures) -> float:
    return figures.num_overdue


def _num_failed(figures: Figures) -> float:
    return figures.num_failed


def _ttft(percent: int) -> Figure:
    return lambda figures: figures.ttft_s[percent]


def _itl(percent: int) -> Figure:
    return lambda figures: figures.itl_s[percent]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(value: float | None) -> str:
    return _number(None if value is None else 1000 * value, ".0f")


# ------------------------------------------------------------- better and worse


def _comparison(results: Results) -> str:
    """Disaggregated against the best of the colocated ones, figure by figure."""
    disaggregated, *colocated = (system.name for system in results.systems)
    fairest = results.fairest(colocated)
    lines = [
        f"Of the colocated ones *{fairest}* met the objectives most often, so it is the fair one "
        f"to compare with. *{disaggregated}* in its proportion, rate by rate (below 1 is less; "
        f"within {_ALIKE:.0%} counts as alike):",
        "",
        "| | " + " | ".join(f"{rate:g}/s" for rate in results.rates) + " | |",
        "|---|" + "---|" * (len(results.rates) + 1),
    ]
    for metric in _METRICS:
        ratios = [_ratio(results, metric, rate, disaggregated, fairest) for rate in results.rates]
        cells = [_number(ratio, ".2f") for ratio in ratios]
        verdict = _verdict([ratio for ratio in ratios if ratio is not None], metric)
        lines.append(f"| {metric.name} | " + " | ".join(cells) + f" | {verdict} |")
    if any(record.outcome == "overdue" for run in results.runs for record in run.records):
        lines += ["", "At rates with overdue requests, these times compare lower bounds."]
    lines += ["", _served(results)]
    return "\n".join(lines)


def _ratio(results: Results, metric: _Metric, rate: float, one: str, other: str) -> float | None:
    a = results.median(one, rate, metric.figure, metric.kind)
    b = results.median(other, rate, metric.figure, metric.kind)
    if a is None or b is None or a == b == 0:
        return None
    return a / b if b else math.inf


def _verdict(ratios: list[float], metric: _Metric) -> str:
    sign = 1 if metric.higher_is_better else -1
    better = sum(sign * (ratio - 1) > _ALIKE for ratio in ratios)
    worse = sum(-sign * (ratio - 1) > _ALIKE for ratio in ratios)
    counts = (("better", better), ("worse", worse), ("alike", len(ratios) - better - worse))
    return ", ".join(f"{word} at {num}" for word, num in counts if num) or "no figures"


def _served(results: Results) -> str:
    """The highest rates up to which at least nine in ten were good."""
    parts = []
    for system in results.systems:
        rate = highest_served_rate(results, system.name)
        parts.append(f"*{system.name}* {'none' if rate is None else f'{rate:g}/s'}")
    return (
        f"Highest rate offered up to which at least {_SERVED_SHARE:.0%} were good: "
        + ", ".join(parts)
        + "."
    )


def highest_served_rate(results: Results, system: str) -> float | None:
    """The last rate before the first at which fewer than nine in ten were good."""
    served = None
    for rate in results.rates:
        share = results.median(system, rate, lambda figures: figures.good_share)
        if share is None or share < _SERVED_SHARE:
            break
        served = rate
    return served
