"""What the curves are made of, their plot, and a table of their ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl

from benchmarks.engine.results import Bound
from benchmarks.measured import Measured
from benchmarks.page import KeptResults, markdown_table

_BOUND = {"linestyle": ":", "linewidth": 1.0}


@dataclass(frozen=True, slots=True)
class Step:
    rows: int
    context: int
    ms: float


@dataclass(frozen=True, slots=True)
class Memory:
    num_blocks: int
    pss_mb: float


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    bound: Bound
    token_bytes: int
    """KV of one token in all layers."""
    block_bytes: int
    steps: tuple[Step, ...]
    memory: tuple[Memory, ...]

    def bound_ms(self, rows: int, context: int) -> float:
        """The matrix products of a step, and reading its KV at the rate at which memory is
        copied."""
        kv_bytes = rows * context * self.token_bytes
        return self.bound.decode_ms[str(rows)] + kv_bytes / self.bound.copy_gb_s / 1e6

    def by_context(self, rows: int) -> list[Step]:
        own = [step for step in self.steps if step.rows == rows]
        return sorted(own, key=lambda step: step.context)

    def by_rows(self, context: int) -> list[Step]:
        own = [step for step in self.steps if step.context == context]
        return sorted(own, key=lambda step: step.rows)

    @property
    def batch_context(self) -> int:
        """The context that every batch was timed at."""
        contexts = [step.context for step in self.steps]
        return max(set(contexts), key=contexts.count)

    @property
    def batches(self) -> list[int]:
        """Those that were timed at several contexts."""
        rows = {step.rows for step in self.steps}
        return sorted(each for each in rows if len(self.by_context(each)) > 1)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "bound": Bound(**data["bound"]),
                "steps": tuple(Step(**each) for each in data["steps"]),
                "memory": tuple(Memory(**each) for each in data["memory"]),
            }
        )


def section(results: Results, plot: Path) -> str:
    rows: list[Sequence[str]] = [("streams", "context", "step, ms", "bound, ms", "step / bound")]
    for step in _ends(results):
        bound_ms = results.bound_ms(step.rows, step.context)
        rows.append(
            (
                str(step.rows), f"{step.context:,}", f"{step.ms:.1f}", f"{bound_ms:.1f}",
                f"{step.ms / bound_ms:.2f}",
            )
        )  # fmt: skip
    setting = (
        f"{results.measured.sentence} Steps of one engine in a process of its own, with the CPU "
        "kernels. The *bound*, dotted in the plots, is the matrix products alone at as many rows, "
        f"packed {results.bound.packed}, and the KV of all "
        f"contexts ({results.token_bytes:,} bytes a token) read at the "
        f"{results.bound.copy_gb_s:.0f} GB/s at which memory was copied. Memory is that of a "
        "worker that has just come up (PSS): its KV cache is taken at once, "
        f"{results.block_bytes:,} bytes a block."
    )
    return f"{setting}\n\n![Steps and memory](benchmarks/{plot.name})\n\n{markdown_table(rows)}"


def _ends(results: Results) -> Iterator[Step]:
    """The shortest and the longest context of each batch, and the largest batch."""
    for batch in results.batches:
        first, *_, last = results.by_context(batch)
        yield first
        yield last
    largest = results.by_rows(results.batch_context)[-1]
    if largest.rows not in results.batches:
        yield largest


def draw(results: Results, path: Path) -> None:
    """Writes an SVG; the same results give the same bytes. Dotted: the bounds."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "baton"
    mpl.rcParams["svg.fonttype"] = "none"
    figure, (by_context, by_batch, memory) = plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained"
    )
    for batch in results.batches:
        own = results.by_context(batch)
        contexts = [step.context for step in own]
        (line,) = by_context.plot(
            contexts, [step.ms for step in own], marker="o", label=f"{batch} streams"
        )
        bounds = [results.bound_ms(batch, context) for context in contexts]
        by_context.plot(contexts, bounds, color=line.get_color(), **_BOUND)
    by_context.set(title="a decode step, ms", xlabel="context, tokens", xscale="log", yscale="log")
    context = results.batch_context
    own = results.by_rows(context)
    batches = [step.rows for step in own]
    by_batch.plot(batches, [step.ms for step in own], marker="o", label=f"context {context}")
    bounds = [results.bound_ms(batch, context) for batch in batches]
    by_batch.plot(batches, bounds, color="C0", **_BOUND)
    by_batch.set(title="a decode step, ms", xlabel="streams", ylim=(0, None))
    blocks = [each.num_blocks for each in results.memory]
    memory.plot(blocks, [each.pss_mb for each in results.memory], marker="o", label="worker")
    memory.plot(
        blocks, [each * results.block_bytes / 1e6 for each in blocks], label="its blocks", **_BOUND
    )
    memory.set(title="memory, MB", xlabel="blocks", ylim=(0, None))
    for axis in (by_context, by_batch, memory):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
