"""Rows of a table that sets policies side by side, on a terminal and in Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy made of a load; the same for replays and simulations."""

    policy: str
    num_cached: int
    ratio: float
    """Of the tokens that one endless cache would have had."""
    ttft_p50_ms: float
    ttft_p90_ms: float
    handoff: str
    by_worker: Mapping[str, int]
    remarks: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank one; ``values`` is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(rows: Sequence[Row], *, by_worker: str) -> str:
    """Markdown. ``by_worker`` says what the numbers by worker are."""
    head = (
        *("policy", "cached tokens", "of the oracle's", "TTFT p50 ms", "p90 ms"),
        *("handed off", by_worker, ""),
    )
    cells = [
        (
            row.policy,
            f"{row.num_cached:,}",
            f"{row.ratio:.3f}",
            f"{row.ttft_p50_ms:.0f}",
            f"{row.ttft_p90_ms:.0f}",
            row.handoff,
            ", ".join(f"{name} {number:,}" for name, number in sorted(row.by_worker.items())),
            row.remarks,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]

    def line(values: Sequence[str]) -> str:
        padded = (v.ljust(width) for v, width in zip(values, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(head), rule, *map(line, cells)])
