"""The sweep's report in Markdown: what was run, the systems side by side, and what is better
and what worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.goodput_results import Results
from benchmarks.page import markdown_table

Verdict = Literal["better", "worse", "unseen"]

MIN_ROUNDS = 4
"""No difference is claimed of fewer: of 3 rounds, chance parts 10 % of equal systems' ranges."""
_SERVED_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class _Unit:
    scale: float
    digits: int
    sign: str = ""

    def number(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"


_SHARE, _RATE, _COUNT = _Unit(100, 0, "%"), _Unit(1, 2, "/s"), _Unit(1, 0)
_SECONDS, _MILLISECONDS = _Unit(1, 2, " s"), _Unit(1000, 0, " ms")


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    figure: str
    """A field of RunFigures."""
    unit: _Unit
    is_time: bool = False
    """Less is better, and with overdue requests it is a lower bound."""


_SHARES = (
    _Row("good requests", "good_share", _SHARE),
    _Row("good by TPOT", "good_share_on_average", _SHARE),
)
ROWS = (
    _Row("goodput", "goodput_per_s", _RATE),
    _Row("TTFT p50 of short chats", "chat_ttft_p50_s", _SECONDS, is_time=True),
    _Row("TTFT p90 of short chats", "chat_ttft_p90_s", _SECONDS, is_time=True),
    _Row("TTFT p50 of long documents", "long_ttft_p50_s", _SECONDS, is_time=True),
    _Row("TTFT p90 of long documents", "long_ttft_p90_s", _SECONDS, is_time=True),
    _Row("ITL p50", "itl_p50_s", _MILLISECONDS, is_time=True),
    _Row("ITL p99", "itl_p99_s", _MILLISECONDS, is_time=True),
    _Row("tokens per second", "tokens_per_s", _COUNT),
)
"""What is compared."""


def section(results: Results, plot: str) -> str:
    """The whole report; ``plot`` is the image's path from the page."""
    disaggregated, *colocated = (system.name for system in results.systems)
    fairest = results.fairest(colocated)
    parts = [
        _setting(results),
        _rule(results, fairest),
        *(_table(results, rate, disaggregated, fairest) for rate in results.rates),
        f"![goodput, TTFT and ITL by offered rate]({plot})",
        *_sentences(results, disaggregated, fairest),
        _served(results),
    ]
    return "\n\n".join(parts)


def _setting(results: Results) -> str:
    load, objectives = results.load, results.objectives
    systems = "; ".join(
        f"*{each.name}* is `baton serve {' '.join(each.arguments)}`" for each in results.systems
    )
    return (
        f"{results.measured.sentence} {systems}: each has all cores, and the same memory for KV. "
        f"{load.long_share:.0%} of the requests are documents of about {load.long_tokens:,} "
        "tokens, each another one; the others are short chats; all are streamed and answered with "
        f"{load.answer_tokens} tokens. A request is *good* if its first token came within "
        f"{objectives.ttft_s:g} s and its ITL at p{objectives.itl_percentile:g} is within "
        f"{1000 * objectives.itl_s:g} ms (*by TPOT*: its mean gap is); after {load.bound_s:.1f} s "
        "it is given up as overdue, and its figures till then count, so that times marked ≥ are "
        f"lower bounds. The load's own process took {results.client_cores:.0%} of a core on "
        f"average, and sent no request more than {1000 * results.max_late_s:.0f} ms late."
    )


def _rule(results: Results, fairest: str) -> str:
    num = results.num_rounds
    rounds = f"{num} rounds" if num > 1 else "one round"
    sizes = f"Each rate was offered in {rounds} of {results.num_requests} requests. "
    if num > 1:
        sizes += "Cells are medians over the rounds, with the least and the most of them. "
    return (
        f"{sizes}Of the colocated systems *{fairest}* had the most good requests, so it is the "
        f"fair one to compare with. {_claims(num)}"
    )


def _claims(num_rounds: int) -> str:
    if num_rounds < MIN_ROUNDS:
        return f"No difference is claimed: that takes {MIN_ROUNDS} rounds."
    return (
        "A difference is claimed only where the ranges of the two do not overlap, which of two "
        f"equal systems happens by chance in {parted_by_chance(num_rounds):.1%} of comparisons."
    )


def parted_by_chance(num_rounds: int) -> float:
    """How often all rounds of one of two equal systems lie above all rounds of the other."""
    return 2 / math.comb(2 * num_rounds, num_rounds)


# ---------------------------------------------------------------------- the tables


def _table(results: Results, rate: float, one: str, other: str) -> str:
    names = [system.name for system in results.systems]
    heads = (f"{rate:g} requests/s offered", *names, f"{one} against {other}")
    lines = [heads]
    for row in _SHARES:
        lines.append((row.name, *(_cell(results, rate, name, row) for name in names), ""))
    for row in ROWS:
        cells = (_cell(results, rate, name, row) for name in names)
        verdict = compare(results, rate, row.figure, one, other)
        lines.append((row.name, *cells, _WORDS[verdict] if _may_claim(results) else ""))
    for title, figure in (("overdue", "num_overdue"), ("failed", "num_failed")):
        counts = (str(_total(results, rate, name, figure)) for name in names)
        lines.append((title, *counts, ""))
    return markdown_table(lines)


def _cell(results: Results, rate: float, system: str, row: _Row) -> str:
    values = results.each(system, rate, row.figure)
    if not values:
        return "-"
    text = _middle(results, rate, system, row)
    if len(values) > 1:
        text += f" ({row.unit.number(min(values))} to {row.unit.number(max(values))})"
    return text


def _middle(results: Results, rate: float, system: str, row: _Row) -> str:
    middle = results.median(system, rate, row.figure)
    assert middle is not None
    mark = "≥ " if row.is_time and _total(results, rate, system, "num_overdue") else ""
    return f"{mark}{row.unit.number(middle)}{row.unit.sign}"


def _total(results: Results, rate: float, system: str, figure: str) -> int:
    return round(sum(results.each(system, rate, figure)))


# ------------------------------------------------------------- better and worse

_WORDS: dict[Verdict, str] = {"better": "better", "worse": "worse", "unseen": "no difference seen"}


def compare(results: Results, rate: float, figure: str, one: str, other: str) -> Verdict:
    """Of ``one`` against ``other``: a difference only where the rounds' ranges do not overlap."""
    (row,) = (row for row in ROWS if row.figure == figure)
    a, b = (results.each(name, rate, figure) for name in (one, other))
    if min(len(a), len(b)) < MIN_ROUNDS or (min(a) <= max(b) and min(b) <= max(a)):
        return "unseen"
    one_is_less = max(a) < min(b)
    # A lower bound is no proof of a shorter time.
    if row.is_time and _total(results, rate, one if one_is_less else other, "num_overdue"):
        return "unseen"
    return "better" if one_is_less == row.is_time else "worse"


def _may_claim(results: Results) -> bool:
    return results.num_rounds >= MIN_ROUNDS


def _sentences(results: Results, one: str, other: str) -> list[str]:
    """One for each rate; none of too few rounds."""
    rates = results.rates if _may_claim(results) else []
    return [_sentence(results, rate, one, other) for rate in rates]


def _sentence(results: Results, rate: float, one: str, other: str) -> str:
    """What is better and what is worse at a rate."""
    found: dict[Verdict, list[str]] = {"better": [], "worse": [], "unseen": []}
    for row in ROWS:
        verdict = compare(results, rate, row.figure, one, other)
        figures = ""
        if verdict != "unseen":
            a, b = (_middle(results, rate, name, row) for name in (one, other))
            figures = f" ({a} against {b})"
        found[verdict].append(row.name + figures)
    said = [
        f"**{verdict}** in {_listed(names)}"
        for verdict, names in found.items()
        if names and verdict != "unseen"
    ]
    if not said:
        return f"At {rate:g}/s no difference between *{one}* and *{other}* is seen in any figure."
    rest = f" No difference is seen in {_listed(found['unseen'])}." if found["unseen"] else ""
    return f"At {rate:g}/s *{one}* is, against *{other}*, {', and '.join(said)}.{rest}"


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _served(results: Results) -> str:
    """The highest rates up to which at least nine in ten were good."""
    parts = []
    for system in results.systems:
        rate = highest_served_rate(results, system.name)
        parts.append(f"*{system.name}* {'none' if rate is None else f'{rate:g}/s'}")
    return (
        f"Highest of these rates up to which at least {_SERVED_SHARE:.0%} were good in the median "
        f"round: {', '.join(parts)}."
    )


def highest_served_rate(results: Results, system: str) -> float | None:
    """The last rate before the first at which fewer than nine in ten were good."""
    served = None
    for rate in results.rates:
        share = results.median(system, rate, "good_share")
        if share is None or share < _SERVED_SHARE:
            break
        served = rate
    return served
