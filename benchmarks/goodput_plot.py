"""The sweep's plot: three figures by offered rate, a line for each system."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from benchmarks.goodput_results import Figure, Results

_PANELS: tuple[tuple[str, Figure], ...] = (
    ("goodput, requests/s", lambda figures: figures.goodput_per_s),
    ("TTFT p90, s", lambda figures: figures.ttft_s[90]),
    ("ITL p99, s", lambda figures: figures.itl_s[99]),
)
_BOUND = {"color": "grey", "linestyle": ":", "linewidth": 1.0}


def draw(results: Results, path: Path) -> None:
    """Writes an SVG; the same results give the same bytes. Points are medians, bars
    reach from the least round to the most. Dotted: everything good, and the objectives."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "baton"
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (title, value) in zip(axes, _PANELS, strict=True):
        for system in results.systems:
            each = [(rate, results.each(system.name, rate, value)) for rate in results.rates]
            present = [(rate, values) for rate, values in each if values]
            middle = [results.median(system.name, rate, value) or 0.0 for rate, _ in present]
            below = [m - min(v) for m, (_, v) in zip(middle, present, strict=True)]
            above = [max(v) - m for m, (_, v) in zip(middle, present, strict=True)]
            axis.errorbar(
                [rate for rate, _ in present],
                middle,
                yerr=[below, above],
                marker="o",
                capsize=3,
                label=f"{system.name} ({system.label})",
            )
        axis.set(title=title, xlabel="offered, requests/s")
        axis.grid(alpha=0.3)
    axes[0].plot(results.rates, results.rates, **_BOUND)
    axes[1].axhline(results.objectives.ttft_s, **_BOUND)
    axes[2].axhline(results.objectives.itl_s, **_BOUND)
    for axis in axes:
        axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
