"""The sweep's report in Markdown: what was run, the systems side by side, and what is better
and what worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.goodput_results import Results, System
from benchmarks.page import listed, markdown_table

Verdict = Literal["better", "worse", "unseen"]

MIN_ROUNDS = 4
"""No difference is claimed of fewer: of 3 rounds, chance parts 10 % of equal systems' ranges."""
_SERVED_SHARE = 0.9
_CHUNK = "engine.max_num_batched_tokens"


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


ROWS = (
    _Row("good requests", "good_share", _SHARE),
    _Row("good by TPOT", "good_share_on_average", _SHARE),
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
_COUNTS = (
    ("missed TTFT", "num_missed_ttft"),
    ("missed ITL", "num_missed_itl"),
    ("overdue", "num_overdue"),
    ("failed", "num_failed"),
)
"""Of all rounds together."""


def section(results: Results, plot: str) -> str:
    """The whole report; ``plot`` is the image's path from the page."""
    disaggregated, *colocated = (system.name for system in results.systems)
    fairest = results.fairest(colocated)
    parts = [
        _setting(results),
        _meaning(results),
        _rule(results, fairest),
        *(_table(results, rate, disaggregated, fairest) for rate in results.rates),
        f"![goodput, TTFT and ITL by offered rate]({plot})",
        *_sentences(results, disaggregated, fairest),
        _misses(results),
        _served(results),
    ]
    return "\n\n".join(parts)


def _setting(results: Results) -> str:
    load, objectives = results.load, results.objectives
    systems = "; ".join(_command(each, results.systems[0]) for each in results.systems)
    return (
        f"{results.measured.sentence} {systems}: each has all cores, and the same memory for KV. "
        f"{_chunks(results.systems)} "
        f"{load.long_share:.0%} of the requests are documents of about {load.long_tokens:,} "
        "tokens, each another one; the others are short chats; all are streamed and answered with "
        f"{load.answer_tokens} tokens. A request is *good* if its first token came within "
        f"{objectives.ttft_s:g} s and its ITL at p{objectives.itl_percentile:g} is within "
        f"{1000 * objectives.itl_s:g} ms (*by TPOT*: its mean gap is, in ITL's place); "
        f"after {load.bound_s:.1f} s it is given up as overdue, and its figures till then count, "
        "so that times marked ≥ are lower bounds. "
        f"The load's own process took {results.client_cores:.0%} of a core on "
        f"average, and sent no request more than {1000 * results.max_late_s:.0f} ms late."
    )


def _command(system: System, usual: System) -> str:
    """What the system is; said of its chunks only where they are not the usual ones."""
    num = system.max_num_batched_tokens
    own = "" if num == usual.max_num_batched_tokens else f" with `{_CHUNK}: {num}`"
    return f"*{system.name}* is `baton serve {' '.join(system.arguments)}`{own}"


def _chunks(systems: Sequence[System]) -> str:
    usual, *colocated = systems
    nums = {each.max_num_batched_tokens for each in systems}
    others = "in all of them" if len(nums) == 1 else "in the others"
    text = (
        f"`{_CHUNK}`, what a worker computes in one step, is {usual.max_num_batched_tokens} "
        f"{others}. Where one worker prefills and decodes, so large a chunk of a document is a "
        "pause in the answers beside it: *gap local* under [Local prefill](#local-prefill) is how "
        "long."
    )
    if min(each.max_num_batched_tokens for each in colocated) >= usual.max_num_batched_tokens:
        text += (
            " No colocated system here has smaller chunks, which would pause for less: as a "
            "baseline they are weak in ITL."
        )
    return text


def _meaning(results: Results) -> str:
    num = results.num_requests
    windows = listed([f"{num / rate:.1f} s" for rate in results.rates])
    return (
        "*Goodput* is the good requests, and *tokens per second* are all tokens, over the time "
        "that a burst took: from its beginning until its last request was over, and no less than "
        "the window in which it was sent. So neither figure is over what was offered, and goodput "
        f"times {results.load.answer_tokens} tokens is part of the tokens per second. Even where "
        "every request is good both are under what was offered, for the last answers come after "
        f"the window: compare systems by them, not with the rate. A burst of {num} requests, sent "
        f"in {windows} at these rates to a system with nothing else to do, shows how it takes a "
        "burst and not what rate it can keep up: a queue that grows has no time to become long, "
        "so if requests went on coming as fast, the share of good ones would rather be less than "
        f"here than more. One request is {1 / num:.0%} of a burst."
    )


def _rule(results: Results, fairest: str) -> str:
    num = results.num_rounds
    rounds = f"{num} rounds" if num > 1 else "one round"
    sizes = f"Each rate was offered in {rounds}, a burst of {results.num_requests} requests each. "
    if num > 1:
        sizes += "Cells are medians over the rounds, with the least and the most of them. "
    return (
        f"{sizes}Of the colocated systems *{fairest}* had the most good requests, so it is the "
        f"fair one to compare with. {_claims(results)}"
    )


def _claims(results: Results) -> str:
    if not _may_claim(results):
        return f"No difference is claimed: that takes {MIN_ROUNDS} rounds."
    return (
        "A difference is claimed only where the ranges of the two do not overlap, which of two "
        f"equal systems happens by chance in {parted_by_chance(results.num_rounds):.1%} of "
        f"comparisons; here are {len(ROWS) * len(results.rates)}."
    )


def parted_by_chance(num_rounds: int) -> float:
    """How often all rounds of one of two equal systems lie above all rounds of the other."""
    return 2 / math.comb(2 * num_rounds, num_rounds)


# ---------------------------------------------------------------------- the tables


def _table(results: Results, rate: float, one: str, other: str) -> str:
    names = [system.name for system in results.systems]
    offered = f"{rate:g} requests/s offered, {rate * results.load.answer_tokens:g} tokens/s"
    heads = (offered, *names, f"{one} against {other}")
    lines = [heads]
    for row in ROWS:
        cells = (_cell(results, rate, name, row) for name in names)
        verdict = compare(results, rate, row.figure, one, other)
        lines.append((row.name, *cells, _WORDS[verdict] if _may_claim(results) else ""))
    for title, figure in _COUNTS:
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
    mark = "≥ " if _bounded(results, rate, system, row) else ""
    return f"{mark}{row.unit.number(middle)}{row.unit.sign}"


def _bounded(results: Results, rate: float, system: str, row: _Row) -> bool:
    """Whether the figure is a lower bound."""
    return row.is_time and _total(results, rate, system, "num_overdue") > 0


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
    if _bounded(results, rate, one if one_is_less else other, row):
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
    found: dict[Verdict, list[_Row]] = {"better": [], "worse": [], "unseen": []}
    for row in ROWS:
        found[compare(results, rate, row.figure, one, other)].append(row)
    said = []
    for verdict, rows in found.items():
        if rows and verdict != "unseen":
            named = [f"{row.name} ({_medians(results, rate, row, one, other)})" for row in rows]
            said.append(f"**{verdict}** in {listed(named)}")
    leaning = _leaning(results, rate, found["unseen"], one, other)
    if not said:
        return (
            f"At {rate:g}/s no difference between *{one}* and *{other}* is seen in any figure"
            f"{leaning}."
        )
    rest = f" No difference is seen in the other figures{leaning}." if found["unseen"] else ""
    return f"At {rate:g}/s *{one}* is, against *{other}*, {', and '.join(said)}.{rest}"


def _leaning(results: Results, rate: float, rows: Sequence[_Row], one: str, other: str) -> str:
    """Whose medians are better where no difference is seen; nothing of those that are printed
    alike and of lower bounds."""
    lean: dict[str, list[str]] = {"better": [], "worse": []}
    for row in rows:
        a, b = (results.median(name, rate, row.figure) for name in (one, other))
        if a is None or b is None or any(_bounded(results, rate, s, row) for s in (one, other)):
            continue
        if row.unit.number(a) != row.unit.number(b):
            named = f"{row.name} ({_medians(results, rate, row, one, other)})"
            lean["better" if (a < b) == row.is_time else "worse"].append(named)
    said = [f"{word} in {listed(names)}" for word, names in lean.items() if names]
    return f"; there the medians of *{one}* are {', and '.join(said)}" if said else ""


def _medians(results: Results, rate: float, row: _Row, one: str, other: str) -> str:
    a, b = (_middle(results, rate, name, row) for name in (one, other))
    return f"{a} against {b}"


def _misses(results: Results) -> str:
    """Which objective it was that requests missed, over all rates."""
    parts = []
    for system in results.systems:
        runs = [run for run in results.runs if run.system == system.name]
        bad = sum(run.num_requests - run.num_good for run in runs)
        ttft, itl = (
            sum(run.num_missed_ttft for run in runs),
            sum(run.num_missed_itl for run in runs),
        )
        parts.append(f"*{system.name}* {bad} ({ttft} by TTFT, {itl} by ITL)")
    num = results.num_rounds * len(results.rates) * results.num_requests
    return (
        f"Not good were, of {num} requests at all rates, and by the objective that they missed, "
        f"which may be both: {', '.join(parts)}."
    )


def _served(results: Results) -> str:
    """The highest rates up to which at least nine in ten were good: goodput in the sense of
    DistServe (Zhong et al., OSDI 2024), though not for each GPU."""
    parts = []
    for system in results.systems:
        rate = highest_served_rate(results, system.name)
        parts.append(f"*{system.name}* {'none' if rate is None else f'{rate:g}/s'}")
    return (
        f"Highest of these rates up to which at least {_SERVED_SHARE:.0%} were good in the median "
        f"round: {', '.join(parts)}. DistServe calls such a rate goodput, of a load that goes on; "
        "of bursts it is likelier too high than too low."
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
