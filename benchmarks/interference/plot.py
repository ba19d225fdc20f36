"""The experiment's plot: the streams' pauses as they came, ITL by percentile, and TTFT."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

from benchmarks.interference.results import PERCENTS, SLOT_S, Results

_SHOWN_S = 20.0


def draw(results: Results, path: Path) -> None:
    """Writes an SVG; the same results give the same bytes. Percentiles are medians of rounds, the
    left panel is the first round. Grey: a long prompt comes."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "baton"
    mpl.rcParams["svg.fonttype"] = "none"  # letters stay letters: a tenth of the size
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(2, 1.3, 1)
    )
    _pauses(results, axes[0])
    _percentiles(results, axes[1])
    _ttft(results, axes[2])
    for axis in axes:
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _pauses(results: Results, axis: Axes) -> None:
    for at_s in results.arrivals_s:
        axis.axvline(at_s, color="grey", alpha=0.4, linewidth=1.0)
    for system in results.systems:
        first = results.of(system.name)[0]
        shown = first.longest_ms[: int(_SHOWN_S / SLOT_S)]
        points = [(slot * SLOT_S, ms) for slot, ms in enumerate(shown) if ms > 0]
        times, longest = zip(*points, strict=True)
        axis.plot(times, longest, linewidth=0.8, label=system.name)
    axis.set_yscale("log")
    axis.set(title=f"longest gap in each {SLOT_S:g} s, ms", xlabel="s")


def _percentiles(results: Results, axis: Axes) -> None:
    places = range(len(PERCENTS))
    for system in results.systems:
        axis.plot(
            places, [results.itl_ms(system.name, p) for p in PERCENTS], marker="o", markersize=3
        )
    names = [f"{percent:g}" if percent < 100 else "max" for percent in PERCENTS]
    axis.set_xticks(list(places), names)
    axis.set_yscale("log")
    axis.set(title="ITL by percentile, ms")


def _ttft(results: Results, axis: Axes) -> None:
    for place, system in enumerate(results.systems):
        median, late = (results.ttft_s(system.name, percent) for percent in (50, 90))
        axis.bar(place, late, alpha=0.4, color=f"C{place}")
        axis.bar(place, median, color=f"C{place}")
    axis.set_xticks([])
    axis.set(title="long prompts' TTFT, s: p50, p90")
