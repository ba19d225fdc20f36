"""What a run of the locustfile prints at its end, and writes for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.figures import QUANTILES, Figures, Objectives, Percentiles, Record, figures_of


def render(records: Sequence[Record], objectives: Objectives, *, num_cut: int) -> str:
    """A table for a terminal. ``num_cut``: requests that the end of the run cut off."""
    kinds = sorted({record.kind for record in records})
    lines = [f"{'':24}{'requests':>9}{'good':>7}  " + _headings()]
    for kind in kinds:
        own = figures_of([record for record in records if record.kind == kind], objectives)
        lines += _rows(kind, own)
    total = figures_of(records, objectives)
    lines += _rows("all", total) if len(kinds) != 1 else []
    return "\n".join([*lines, "", *_sentences(total, objectives, num_cut)])


def _headings() -> str:
    return "".join(f"{f'p{percent}':>9}" for percent in QUANTILES) + "  ms"


def _rows(name: str, figures: Figures) -> list[str]:
    counts = f"{figures.num_requests:>9}{figures.good_share:>7.0%}"
    rows = []
    for label, values in (
        ("TTFT", figures.ttft_s),
        ("ITL", figures.itl_s),
        ("TPOT", figures.tpot_s),
        ("end to end", figures.e2e_s),
    ):
        rows.append(f"{name:<13}{label:<11}{counts}  {_milliseconds(values)}")
        name = counts = ""
        counts = " " * 16
    return rows


def _milliseconds(values: Percentiles) -> str:
    cells = (f"{1000 * v:9.1f}" if v is not None else f"{'-':>9}" for v in values.values())
    return "".join(cells)


def _sentences(figures: Figures, objectives: Objectives, num_cut: int) -> list[str]:
    lines = [
        f"goodput      {figures.goodput_per_s:.2f} requests/s, {figures.good_share:.1%} of "
        f"{figures.num_requests}: TTFT within {1000 * objectives.ttft_s:g} ms and ITL p"
        f"{objectives.itl_percentile:g} within {1000 * objectives.itl_s:g} ms "
        f"({figures.good_share_on_average:.1%} with TPOT in the place of ITL)",
        f"tokens       {figures.tokens_per_s:.1f}/s, {figures.num_tokens} in "
        f"{figures.duration_s:.1f} s, counted by {', '.join(sorted(figures.counted_by)) or '-'}",
        f"failed       {figures.num_failed}",
        *(f"             {n} x {why}" for why, n in sorted(figures.failures.items())),
    ]
    if num_cut:
        lines.append(f"cut off      {num_cut} by the end of the run; counted nowhere above")
    return lines


def write_json(
    path: Path, records: Sequence[Record], objectives: Objectives, *, num_cut: int
) -> None:
    """Figures and every record."""
    figures = asdict(figures_of(records, objectives))
    figures["counted_by"] = sorted(figures["counted_by"])
    data = {
        "objectives": asdict(objectives),
        "figures": figures,
        "num_cut": num_cut,
        "records": [record.to_json() for record in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
