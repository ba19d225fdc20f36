"""What prompts took when they were asked first and again, and whether that reaches the goal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.measured import Measured
from benchmarks.page import KeptResults, markdown_table

APART, COLOCATED = "disaggregated", "colocated"
GOAL = 0.15
"""Of a repeated prompt's TTFT to that of its first time, at most."""
PARTS = ("queue", "route", "room", "prefill")
"""Of a request's timeline, up to its first token; what is left is the gateway's HTTP."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured request; times in ms."""

    way: str
    prompt: int
    repeat: int
    """0 is its first time."""
    num_tokens: int
    num_cached_tokens: int
    prefill_worker: str | None
    """None where decode prefilled by itself."""
    ttft_ms: float
    """At the client, from sending."""
    parts_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    dtype: str
    num_prompts: int
    num_repeats: int
    samples: tuple[Sample, ...]

    @property
    def ways(self) -> list[str]:
        return list(dict.fromkeys(sample.way for sample in self.samples))

    def of(self, way: str, *, repeated: bool) -> list[Sample]:
        return [s for s in self.samples if s.way == way and (s.repeat > 0) == repeated]

    def median_ms(self, way: str, *, repeated: bool) -> float:
        """The TTFT."""
        return statistics.median(s.ttft_ms for s in self.of(way, repeated=repeated))

    def ratio(self, way: str) -> float:
        """Of the medians, repeated to first."""
        return self.median_ms(way, repeated=True) / self.median_ms(way, repeated=False)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "samples": tuple(Sample(**each) for each in data["samples"]),
            }
        )


def section(results: Results) -> str:
    """The whole report."""
    (num_tokens,) = {sample.num_tokens for sample in results.samples}
    setting = (
        f"{results.measured.sentence} Each of {results.num_prompts} prompts of {num_tokens:,} "
        f"tokens (dtype {results.dtype}) is asked once and then {results.num_repeats} times "
        "again, one request at a time on an idle server: of one prefill and one decode worker "
        f"(*{APART}*), and of one worker that does both (*{COLOCATED}*). TTFT is the client's, "
        "in ms: medians, and in brackets the least and the most."
    )
    parts = (
        "Where the repeated times go, by the requests' own timelines (medians, in ms; *prefill* "
        "includes waiting for the worker and the token's way to the gateway, *the rest* is HTTP "
        "and the client):"
    )
    sentences = " ".join(_sentence(results, way) for way in results.ways)
    return "\n\n".join([setting, table(results), sentences, parts, parts_table(results)])


def table(results: Results) -> str:
    lines: list[Sequence[str]] = [
        ("", "first TTFT", "repeated TTFT", "ratio", "cached tokens", "prefilled by")
    ]
    for way in results.ways:
        cells = [_times(results.of(way, repeated=repeated)) for repeated in (False, True)]
        again = results.of(way, repeated=True)
        cached = statistics.median(sample.num_cached_tokens for sample in again)
        workers = sorted({"decode" if s.prefill_worker is None else "prefill" for s in again})
        lines.append((way, *cells, f"{results.ratio(way):.3f}", f"{cached:g}", ", ".join(workers)))
    return markdown_table(lines)


def parts_table(results: Results) -> str:
    lines: list[Sequence[str]] = [("", *PARTS, "the rest")]
    for way in results.ways:
        again = results.of(way, repeated=True)
        cells = [statistics.median(sample.parts_ms[part] for sample in again) for part in PARTS]
        rest = statistics.median(s.ttft_ms - sum(s.parts_ms.values()) for s in again)
        lines.append((way, *(f"{cell:.1f}" for cell in (*cells, rest))))
    return markdown_table(lines)


def _times(samples: Sequence[Sample]) -> str:
    times = [sample.ttft_ms for sample in samples]
    return f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})"


def _sentence(results: Results, way: str) -> str:
    ratio = results.ratio(way)
    said = "reached" if ratio <= GOAL else "missed"
    return f"*{way}*: {ratio:.3f} of the first time (the goal of {GOAL:g} is {said})."
