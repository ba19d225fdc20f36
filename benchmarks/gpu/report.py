"""What bench-gpu has found out, and its section of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks import page
from benchmarks.measured import Measured

DECODE_GOAL = 0.7
PREFILL_GOAL = 0.6


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of so many sequences at one context; ``fraction`` is the time that its bytes take
    at the rate of a copy, over the time that it took."""

    model: str
    batch: int
    context: int
    step_ms: float
    num_bytes: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Prefill:
    """A prompt in one step; ``fraction`` is its operations a second over those of a product."""

    model: str
    num_tokens: int
    took_ms: float
    fraction: float


@dataclass(frozen=True, slots=True)
class Kernel:
    """Attention of one layer: ``error`` is that of Triton against the reference, in the
    Frobenius norm; times are in ms, None where it was not measured."""

    name: str
    error: float | None = None
    triton_ms: float | None = None
    flashinfer_ms: float | None = None
    read_gb_s: float | None = None
    """KV that Triton reads in that time."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """Requests of so many tokens each, from one process's pool to another's on the same GPU;
    ``fraction`` is their bytes, read and written, a second over those of a copy."""

    shape: str
    num_tokens: int
    requests: int
    took_ms: float
    num_bytes: int
    fraction: float


@dataclass(frozen=True, slots=True)
class Results(page.KeptResults):
    measured: Measured
    device: str
    torch: str
    triton: str
    attention: str
    """What computed the attention of prompts."""
    copied_gb_s: float
    multiplied_tflop_s: float
    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]
    kernels: tuple[Kernel, ...]
    handoffs: tuple[Handoff, ...] = ()
    left_out: tuple[str, ...] = ()
    """Models that are not measured, or not to their end, each with why."""

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        made = {
            "measured": Measured(**data["measured"]),
            "decodes": tuple(Decode(**each) for each in data["decodes"]),
            "prefills": tuple(Prefill(**each) for each in data["prefills"]),
            "kernels": tuple(Kernel(**each) for each in data["kernels"]),
            "handoffs": tuple(Handoff(**each) for each in data.get("handoffs", ())),
            "left_out": tuple(data.get("left_out", ())),
        }
        return cls(**{**data, **made})


def section(kept: Path) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report(Results.read(kept))


def report(results: Results) -> str:
    setting = (
        f"{results.measured.sentence} The GPU is one {results.device}; torch {results.torch}, "
        f"triton {results.triton}. One engine in a process of its own, random weights in "
        f"bfloat16 of the shapes of Llama 3.2 1B and Llama 3.1 8B, attention of prompts by "
        f"{results.attention}. Memory was copied at {results.copied_gb_s:,.0f} GB/s (read and "
        f"written), large matrices were multiplied at {results.multiplied_tflop_s:,.0f} "
        "TFLOP/s. A step's *bytes* are every weight once and the KV that it reads; times are "
        "medians, the host's part and the read-back of the tokens included. A prompt is computed "
        "in one step, where a worker takes engine.max_num_batched_tokens at a time."
    )
    if results.left_out:
        setting += f" Not measured to the end: {'; '.join(results.left_out)}."
    parts = [setting, _decodes(results), _prefills(results), _kernels(results)]
    if results.handoffs:
        parts.append(_handoffs(results))
    return "\n\n".join(parts)


def _decodes(results: Results) -> str:
    rows: list[SequenceOf[str]] = [
        (
            *("decode", "batch", "context", "step, ms", "bytes, GB"),
            f"of a copy's rate (goal {DECODE_GOAL})",
        )
    ]
    rows += [
        (
            *(each.model, str(each.batch), f"{each.context:,}", f"{each.step_ms:.2f}"),
            *(f"{each.num_bytes / 1e9:.1f}", _against(each.fraction, DECODE_GOAL)),
        )
        for each in results.decodes
    ]
    return page.markdown_table(rows)


def _prefills(results: Results) -> str:
    rows: list[SequenceOf[str]] = [
        ("prefill", "tokens", "took, ms", f"of a product's rate (goal {PREFILL_GOAL})")
    ]
    rows += [
        (
            *(each.model, f"{each.num_tokens:,}", f"{each.took_ms:.1f}"),
            _against(each.fraction, PREFILL_GOAL),
        )
        for each in results.prefills
    ]
    return page.markdown_table(rows)


def _kernels(results: Results) -> str:
    rows: list[SequenceOf[str]] = [
        ("attention of one layer", "error", "Triton, ms", "FlashInfer, ms", "KV read, GB/s")
    ]
    rows += [
        (
            each.name,
            "" if each.error is None else f"{each.error:.1e}",
            "" if each.triton_ms is None else f"{each.triton_ms:.3f}",
            "not measured" if each.flashinfer_ms is None else f"{each.flashinfer_ms:.3f}",
            "" if each.read_gb_s is None else f"{each.read_gb_s:,.0f}",
        )
        for each in results.kernels
    ]
    return page.markdown_table(rows)


def _handoffs(results: Results) -> str:
    rows: list[SequenceOf[str]] = [
        ("hand-off over CUDA IPC", "tokens", "requests", "took, ms", "GB/s", "of a copy's rate")
    ]
    rows += [
        (
            *(each.shape, f"{each.num_tokens:,}", str(each.requests), f"{each.took_ms:.2f}"),
            *(f"{each.num_bytes / 1e6 / each.took_ms:,.0f}", f"{each.fraction:.2f}"),
        )
        for each in results.handoffs
    ]
    return page.markdown_table(rows)


def _against(fraction: float, goal: float) -> str:
    return f"{fraction:.2f}" + ("" if fraction >= goal else ", missed")
