"""What the engine took beside the bound of the same run and beside peers, as tables of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.engine.results import Results
from benchmarks.page import listed, markdown_table

BATON = "baton"
DECODE_GOAL = 1.5
"""A decode step's time over that of its matrix products, at most."""
PROMPT_GOAL = 0.7
"""The matrix products' time over a prompt's TTFT, at least."""
_WHY = "where the time and the memory go is in [ADR 14](adr/0014-cpu-kernels.md)."
OUTSIDE_GOAL_MS = 1.0
"""Of a decode step, besides the model, at most."""


@dataclass(frozen=True, slots=True)
class _Goals:
    """Beside a peer: tokens/s by streams at least; TTFT, start and memory at most, if at all."""

    own: str
    rates: Mapping[int, float]
    ttft: float | None = None
    start: float | None = None
    memory: float | None = None


PEER_GOALS = {
    "vllm": _Goals(BATON, {1: 1.5, 8: 1.3, 32: 1.3}, ttft=0.75, start=0.2, memory=0.5),
    "llamacpp": _Goals(f"{BATON} int4", {1: 0.8, 8: 2.0, 32: 2.0}),
}


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A figure of Baton's over a peer's. At most one of ``least`` and ``most`` is its goal."""

    what: str
    own: float
    other: float
    digits: int = 0
    """After the point, of the two figures."""
    least: float | None = None
    most: float | None = None

    @property
    def value(self) -> float:
        """As it is shown, so that nobody reads that 1.50 misses 1.5."""
        return round(self.own / self.other, 2)

    @property
    def missed(self) -> bool:
        too_low = self.least is not None and self.value < self.least
        return too_low or (self.most is not None and self.value > self.most)

    @property
    def cells(self) -> Sequence[str]:
        goal = said = ""
        if self.least is not None or self.most is not None:
            goal = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
            said = "missed" if self.missed else "reached"
        figures = (f"{each:,.{self.digits}f}" for each in (self.own, self.other))
        return (self.what, *figures, f"{self.value:.2f}", goal, said)


def section(results: Results) -> str:
    """The whole report."""
    copied = statistics.median(bound.copy_gb_s for bound in results.bounds)
    prompts = sorted({s.prompt_tokens for s in results.samples if not s.streams})
    setting = (
        f"{results.measured.sentence} Streams of {results.answer_tokens} tokens after prompts of "
        f"about {results.context_tokens} run at once; a *step* is the time between two tokens of "
        "a stream while all of them decode. A prompt of "
        f"{' to '.join(str(n) for n in (prompts[0], prompts[-1]))} tokens is asked on an idle "
        "server. The *bound* is what the model's matrix products alone take at as many rows, "
        f"packed {results.bounds[0].packed}, by the same number of threads, in the same minutes; "
        "*tokens/s* are the streams over their step, so what a server decodes while nobody asks "
        "for a prompt; "
        "times are medians of "
        f"{len(results.bounds)} rounds in which all take turns. Memory was copied at "
        f"{copied:.0f} GB/s (read and written)."
    )
    if results.kv_tokens is not None:
        setting += f" Every server has room for the KV of {results.kv_tokens:,} tokens."
    parts = [setting, table(results), servers_table(results), sentences(results)]
    if results.outsides:
        parts.append(outside(results))
    for peer, goals in PEER_GOALS.items():
        if {peer, goals.own} <= set(results.names):
            parts.append(beside_peer(results, peer, goals))
    return "\n\n".join(parts)


def table(results: Results) -> str:
    names = results.names
    heads = [head for name in names for head in (f"{name} ms", f"{name} / bound")]
    lines: list[Sequence[str]] = [("", "bound ms", *heads)]
    for streams in (*results.loads, 0):
        load = "a prompt's TTFT" if streams == 0 else f"step at {streams}"
        bound = results.bound_ms(streams)
        times = [results.ms(name, streams) for name in names]
        cells = [cell for ms in times for cell in (f"{ms:.1f}", f"{ms / bound:.2f}")]
        lines.append((load, f"{bound:.1f}", *cells))
    return markdown_table(lines)


def servers_table(results: Results) -> str:
    lines: list[Sequence[str]] = [
        ("", "start s", "memory MB (PSS)", *(f"tokens/s at {n}" for n in results.loads))
    ]
    for name in results.names:
        server = results.server(name)
        rates = [f"{results.tokens_per_s(name, n):.0f}" for n in results.loads]
        said = f"{name} ({server.version})" if server.version else name
        lines.append((said, f"{server.start_s:.1f}", f"{server.pss_mb:,.0f}", *rates))
    return markdown_table(lines)


def sentences(results: Results) -> str:
    parts = []
    for streams in results.loads:
        ratio = results.ms(BATON, streams) / results.bound_ms(streams)
        parts.append(
            f"A step at {streams} takes {ratio:.2f} of its bound (the goal of {DECODE_GOAL:g} is "
            f"{'reached' if ratio <= DECODE_GOAL else 'missed'})."
        )
    share = results.bound_ms(0) / results.ms(BATON, 0)
    said = "reached" if share >= PROMPT_GOAL else "missed"
    parts.append(
        f"A prompt goes at {share:.2f} of its bound (the goal of {PROMPT_GOAL} is {said})."
    )
    if all(bound.own_decode_ms for bound in results.bounds):
        parts.append(_beside_own_products(results))
    return " ".join(parts)


def _beside_own_products(results: Results) -> str:
    """How much of it all is not the engine's own products."""
    own_ms = [
        statistics.median(bound.own_decode_ms[str(streams)] for bound in results.bounds)
        for streams in results.loads
    ]
    own_prompt_ms = statistics.median(bound.own_prompt_ms for bound in results.bounds)
    ratios = [
        results.ms(BATON, streams) / ms for streams, ms in zip(results.loads, own_ms, strict=True)
    ]
    return (
        "Goals count from the library's products, which are no work of Baton's. The engine's own "
        "alone take "
        f"{listed([f'{ms:.1f}' for ms in own_ms])} ms, and "
        f"{own_prompt_ms:.0f} for the prompt: beside those a step takes "
        f"{listed([f'{ratio:.2f}' for ratio in ratios])}, and a prompt goes at "
        f"{own_prompt_ms / results.ms(BATON, 0):.2f}."
    )


def outside(results: Results) -> str:
    """What a step costs besides the model, for each way to draw tokens."""
    rows = results.outsides[0].rows
    parts = []
    for sampling in dict.fromkeys(each.sampling for each in results.outsides):
        own = [each for each in results.outsides if each.sampling == sampling]
        ms = statistics.median(each.outside_ms for each in own)
        draw_ms = statistics.median(each.draw_ms for each in own)
        said = "reached" if ms <= OUTSIDE_GOAL_MS else "missed"
        parts.append(f"{ms:.2f} ms {sampling} ({draw_ms:.2f} of them for the draw: {said})")
    return (
        f"Besides the model (scheduling, tables, sampling, making the events of tokens) a step at "
        f"{rows} takes {'; '.join(parts)}. The goal is {OUTSIDE_GOAL_MS:g} ms. Sending the events "
        "to gateways is not in it: the worker's event loop does that beside the next step, and "
        "what it takes from that one is in the times over HTTP alone."
    )


def beside_peer(results: Results, peer: str, goals: _Goals) -> str:
    """Baton's figures over the peer's as a table, and which goals are missed."""
    ratios = _ratios(results, peer, goals)
    heads = ("", goals.own, peer, "ratio", "goal", "")
    missed = [ratio.what for ratio in ratios if ratio.missed]
    said = (
        f"Missed beside *{peer}*: {', '.join(missed)}; {_WHY}" if missed else "No goal is missed."
    )
    return f"{markdown_table([heads, *(ratio.cells for ratio in ratios)])}\n\n{said}"


def _ratios(results: Results, peer: str, goals: _Goals) -> list[_Ratio]:
    own, other = results.server(goals.own), results.server(peer)
    rates = [
        _Ratio(
            f"tokens/s at {streams}",
            results.tokens_per_s(own.name, streams),
            results.tokens_per_s(peer, streams),
            least=goals.rates.get(streams),
        )
        for streams in results.loads
    ]
    ttfts = results.ms(own.name, 0), results.ms(peer, 0)
    return [
        *rates,
        _Ratio("a prompt's TTFT (ms)", *ttfts, most=goals.ttft),
        _Ratio("start (s)", own.start_s, other.start_s, digits=1, most=goals.start),
        _Ratio("memory (MB)", own.pss_mb, other.pss_mb, most=goals.memory),
    ]
