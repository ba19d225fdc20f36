"""What single prompts took, disaggregated and local, and from where on which is faster."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.measured import Measured
from benchmarks.page import KeptResults, markdown_table

APART, LOCAL = "disaggregated", "local"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured request; times in ms."""

    way: str
    num_streams: int
    """That decoded beside it."""
    num_uncached: int
    ttft_ms: float
    second_ms: float
    """To the second token."""
    worst_gap_ms: float
    """Of the other streams, while the request had no second token; 0 without such."""


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    dtype: str
    repeats: int
    """Of every measurement."""
    num_prefix_tokens: int
    """Held before each by the decode worker; apart, by the prefill worker as well."""
    samples: tuple[Sample, ...]

    @property
    def loads(self) -> list[int]:
        """Numbers of streams beside the measured request."""
        return sorted({sample.num_streams for sample in self.samples})

    @property
    def lengths(self) -> list[int]:
        """Numbers of uncached tokens."""
        return sorted({sample.num_uncached for sample in self.samples})

    def median(self, way: str, num_streams: int, num_uncached: int, field: str) -> float:
        key = (way, num_streams, num_uncached)
        return float(
            statistics.median(
                getattr(each, field)
                for each in self.samples
                if (each.way, each.num_streams, each.num_uncached) == key
            )
        )

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "samples": tuple(Sample(**each) for each in data["samples"]),
            }
        )


def delays(results: Results, num_streams: int) -> dict[int, float]:
    """By length, how many ms later local prefill brings the second token, by the medians;
    negative where it is sooner."""
    return {
        length: results.median(LOCAL, num_streams, length, "second_ms")
        - results.median(APART, num_streams, length, "second_ms")
        for length in results.lengths
    }


def section(results: Results) -> str:
    """The whole report."""
    setting = (
        f"{results.measured.sentence} One prefill and one decode worker (dtype {results.dtype}) "
        f"hold the first {results.num_prefix_tokens} tokens of a conversation and compute the "
        "next turn of it: *apart*, on the prefill worker, or *local*, by the decode worker alone. "
        "Beside it no other stream decodes, or several do; *gap* is the longest pause of theirs "
        "meanwhile. "
        f"Times are medians of {results.repeats}, in ms."
    )
    sentences = [_sentence(results, num_streams) for num_streams in results.loads]
    return "\n\n".join([setting, table(results), " ".join(sentences)])


def table(results: Results) -> str:
    heads = (
        *("streams", "uncached tokens", "TTFT apart", "TTFT local"),
        *("2nd token apart", "2nd token local", "gap apart", "gap local"),
    )
    lines: list[Sequence[str]] = [heads]
    for num_streams in results.loads:
        for length in results.lengths:
            cells = [
                f"{results.median(way, num_streams, length, field):.0f}"
                for field in ("ttft_ms", "second_ms", "worst_gap_ms")
                for way in (APART, LOCAL)
            ]
            if num_streams == 0:
                cells[-2:] = ["-", "-"]
            lines.append([str(num_streams), str(length), *cells])
    return markdown_table(lines)


def _sentence(results: Results, num_streams: int) -> str:
    where = f"Beside {num_streams} streams" if num_streams else "On an idle server"
    later = {length: by for length, by in delays(results, num_streams).items() if by > 0}
    said = f"{where} local prefill brings the second token "
    if not later:
        said += "no later at any length"
    else:
        lengths = ", ".join(str(length) for length in later)
        said += f"later at {lengths} uncached tokens (by {max(later.values()):.0f} ms at most)"
        if len(later) < len(results.lengths):
            said += ", no later at the other lengths"
    if not num_streams:
        return f"{said}."
    most = results.lengths[-1]
    gaps = [results.median(way, num_streams, most, "worst_gap_ms") for way in (APART, LOCAL)]
    return (
        f"{said}; at {most} tokens the others' longest pause is {gaps[0]:.0f} ms apart and "
        f"{gaps[1]:.0f} ms local."
    )
