"""The sweep's plot: three figures by offered rate, a line for each system."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from benchmarks.goodput_results import Results, median

_PANELS = (
    ("goodput, requests/s", "goodput_per_s"),
    ("TTFT of short chats p50, s", "chat_ttft_p50_s"),
    ("ITL p99, s", "itl_p99_s"),
)
_BOUND = {"color": "grey", "linestyle": ":", "linewidth": 1.0}


def draw(results: Results, path: Path) -> None:
    """Writes an SVG; the same results give the same bytes. Points are medians, bars
    reach from the least round to the most. Dotted: all that was offered, and the objectives."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "baton"
    mpl.rcParams["svg.fonttype"] = "none"  # letters stay letters: a tenth of the size
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(12, 3.6), layout="constrained")
    for axis, (title, field) in zip(axes, _PANELS, strict=True):
        for system in results.systems:
            each = [(rate, results.each(system.name, rate, field)) for rate in results.rates]
            present = [(rate, values) for rate, values in each if values]
            middle = [median(values) or 0.0 for _, values in present]
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
