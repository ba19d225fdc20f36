"""What the interference experiment came to, as tables beside its goals."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.interference.results import PAUSE_S, Results
from benchmarks.interference.systems import (
    COLOCATED,
    DISAGGREGATED,
    VLLM,
    VLLM_DISAGGREGATED,
)
from benchmarks.page import markdown_table

ITL_P50_GOAL_MS = 40.0
OWN_P99_GOAL = 2.0
"""ITL p99 over its own p50, at most."""
VLLM_P99_GOAL = 0.1
"""ITL p99 over that of vLLM colocated, at most."""
TTFT_P90_GOAL_S = 3.0
TOKENS_GOAL = 2.0
"""Tokens/s over those of vLLM disaggregated, at least."""


def section(results: Results, plot: str) -> str:
    """The whole report. ``plot`` is its picture's address, relative to the page."""
    parts = [_setting(results), table(results), placed_table(results), goals_table(results)]
    picture = f"![the streams' gaps, and the long prompts' TTFT]({plot})"
    return "\n\n".join([*parts, picture, _costs(results), *_sweep(results)])


def _setting(results: Results) -> str:
    load = results.load
    version = results.vllm_version
    vllm = f" *vllm* is version {version}, its build for CPUs." if version else ""
    return (
        f"{results.measured.sentence} {load.num_streams} streams decode, each answered with "
        f"{load.stream_tokens} tokens at a time, while prompts of up to {results.prompt_tokens:,} "
        f"tokens, no two alike, arrive at {load.rate_per_s:g}/s: {load.num_prompts} at random "
        f"moments of {load.window_s:g} s, the same for all systems, each answered with "
        f"{load.answer_tokens} tokens. All have the same two cores, the same weights in bfloat16 "
        "and 1 GiB for KV in each worker or instance. *ITL* are the gaps between two tokens of a "
        f"stream until the last prompt is answered; *paused* is the share of the streams' time in "
        f"gaps over {PAUSE_S * 1000:.0f} ms; *TTFT* is the long prompts', and counts from the "
        f"moment that was drawn; a prompt that is not answered after {load.bound_s:g} s is given "
        f"up as overdue. *Tokens/s* are those of {load.num_saturating} streams that decode at "
        "once, without prompts. Memory is the processes' proportional set sizes, with KV. Figures "
        f"are medians of {results.num_rounds} rounds, in each of which every system is started "
        f"afresh.{vllm}"
    )


def table(results: Results) -> str:
    head = (
        "", "ITL p50 ms", "p99 ms", "p99.9 ms", "longest ms", "paused", "TTFT p50 s", "p90 s",
        f"tokens/s at {results.load.num_saturating}", "memory MB", "start s", "overdue", "failed",
    )  # fmt: skip
    lines: list[Sequence[str]] = [head]
    for system in results.systems:
        name = system.name
        itl = (f"{results.itl_ms(name, percent):.1f}" for percent in (50, 99, 99.9, 100))
        ttft = (f"{results.ttft_s(name, percent):.2f}" for percent in (50, 90))
        lost = (
            str(sum(getattr(each, field) for each in results.of(name)))
            for field in ("num_overdue", "num_failed")
        )
        lines.append(
            (
                name, *itl, f"{results.median(name, 'paused_share'):.1%}", *ttft,
                f"{results.tokens_per_s(name):.0f}", f"{results.median(name, 'pss_mb'):,.0f}",
                f"{results.median(name, 'start_s'):.0f}", *lost,
            )
        )  # fmt: skip
    return markdown_table(lines)


def placed_table(results: Results) -> str:
    lines: list[Sequence[str]] = [("", "what it is", "first core", "second core")]
    lines += [(system.name, system.label, *system.placed) for system in results.systems]
    return markdown_table(lines)


def goals_table(results: Results) -> str:
    """Those that can be judged: a peer that was left out leaves out what is relative to it."""
    own = DISAGGREGATED
    p50, p99 = (results.itl_ms(own, percent) for percent in (50, 99))
    ttft_s, rate = results.ttft_s(own, 90), results.tokens_per_s(own)
    lines: list[Sequence[str]] = [
        ("goal for *baton disaggregated*", "measured", ""),
        (f"ITL p50 ≤ {ITL_P50_GOAL_MS:g} ms", f"{p50:.1f} ms", _judged(p50 <= ITL_P50_GOAL_MS)),
        (
            f"ITL p99 ≤ {OWN_P99_GOAL:g} × its own p50",
            f"{p99 / p50:.2f} ×",
            _judged(p99 <= OWN_P99_GOAL * p50),
        ),
    ]
    if results.has(VLLM):
        ratio = p99 / results.itl_ms(VLLM, 99)
        goal = f"ITL p99 ≤ {VLLM_P99_GOAL:g} × that of *{VLLM}*"
        lines.append((goal, f"{ratio:.3f} ×", _judged(ratio <= VLLM_P99_GOAL)))
    goal = f"long prompts' TTFT p90 ≤ {TTFT_P90_GOAL_S:g} s"
    lines.append((goal, f"{ttft_s:.2f} s", _judged(ttft_s <= TTFT_P90_GOAL_S)))
    if results.has(VLLM_DISAGGREGATED):
        ratio = rate / results.tokens_per_s(VLLM_DISAGGREGATED)
        goal = (
            f"tokens/s at {results.load.num_saturating} ≥ {TOKENS_GOAL:g} × those of "
            f"*{VLLM_DISAGGREGATED}*"
        )
        lines.append((goal, f"{ratio:.2f} ×", _judged(ratio >= TOKENS_GOAL)))
    return markdown_table(lines)


def _judged(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _costs(results: Results) -> str:
    """What disaggregation takes from the same two cores, and what it gives."""
    own, other = DISAGGREGATED, COLOCATED
    pairs = {
        "a long prompt's TTFT p50": (
            results.ttft_s(own, 50), results.ttft_s(other, 50), ".2f", "s",
        ),
        "p90": (results.ttft_s(own, 90), results.ttft_s(other, 90), ".2f", "s"),
        f"tokens/s at {results.load.num_saturating} streams": (
            results.tokens_per_s(own), results.tokens_per_s(other), ".0f", "",
        ),
        "ITL p50": (results.itl_ms(own, 50), results.itl_ms(other, 50), ".1f", "ms"),
        "memory": (results.median(own, "pss_mb"), results.median(other, "pss_mb"), ",.0f", "MB"),
    }  # fmt: skip
    said = ", ".join(
        f"{name} {a:{form}} against {b:{form}} {unit}".rstrip()
        for name, (a, b, form, unit) in pairs.items()
    )
    gained = (
        f"ITL p99 {results.itl_ms(own, 99):.1f} against {results.itl_ms(other, 99):.1f} ms, and "
        f"{results.median(own, 'paused_share'):.1%} against "
        f"{results.median(other, 'paused_share'):.1%} of the streams' time in pauses"
    )
    return (
        f"**What it costs.** On two cores each phase has one: a prompt is computed by half of the "
        "machine, and so is every token, whatever the other half has to do; the weights are there "
        f"twice, and a prompt's KV too while it is handed over. *{own}* against *{other}*: {said}. "
        f"What it is paid for: {gained}."
    )


def _sweep(results: Results) -> list[str]:
    if not results.tried:
        return []
    chosen = next(s.max_num_batched_tokens for s in results.systems if s.name == COLOCATED)
    lines: list[Sequence[str]] = [
        ("`engine.max_num_batched_tokens`", "ITL p50 ms", "ITL p99 ms", "TTFT p90 s")
    ]
    for each in results.tried:
        size = (
            f"{each.max_num_batched_tokens}{' (taken)' * (each.max_num_batched_tokens == chosen)}"
        )
        lines.append(
            (size, f"{each.itl_p50_ms:.1f}", f"{each.itl_p99_ms:.1f}", f"{each.ttft_p90_s:.2f}")
        )
    sentence = (
        f"*{COLOCATED}* has the best chunk size of these, each tried once under a shorter load of "
        f"the same kind: the lowest ITL p99 among those with a TTFT p90 of at most "
        f"{TTFT_P90_GOAL_S:g} s, and where none has it, the lowest TTFT p90."
    )
    return [sentence, markdown_table(lines)]
