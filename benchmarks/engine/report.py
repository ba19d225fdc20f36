"""What the engine took beside the bound of the same run, as a table of ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.engine.bound import Bound
from benchmarks.measured import Measured
from benchmarks.page import KeptResults, markdown_table

BATON = "baton"
DECODE_GOAL = 1.5
"""A decode step's time over that of its matrix products, at most."""
PROMPT_GOAL = 0.7
"""The matrix products' time over a prompt's TTFT, at least."""


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
class Server:
    name: str
    start_s: float
    pss_mb: float
    """After the last measurement."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one server: so many streams at once, or a prompt alone (0 streams)."""

    server: str
    streams: int
    prompt_tokens: int
    ms: float
    """A decode step's time, or the prompt's TTFT."""


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    context_tokens: int
    answer_tokens: int
    bounds: tuple[Bound, ...]
    """One of each round."""
    servers: tuple[Server, ...]
    samples: tuple[Sample, ...]

    def server(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    @property
    def loads(self) -> list[int]:
        return sorted({sample.streams for sample in self.samples if sample.streams})

    def ms(self, server: str, streams: int) -> float:
        """The median over rounds; of 0 streams the TTFT."""
        return statistics.median(
            s.ms for s in self.samples if s.server == server and s.streams == streams
        )

    def bound_ms(self, streams: int) -> float:
        if streams == 0:
            return statistics.median(bound.prompt_ms for bound in self.bounds)
        return statistics.median(bound.decode_ms[str(streams)] for bound in self.bounds)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "bounds": tuple(Bound(**each) for each in data["bounds"]),
                "servers": tuple(Server(**each) for each in data["servers"]),
                "samples": tuple(Sample(**each) for each in data["samples"]),
            }
        )


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
        "packed, by the same number of threads, in the same minutes; times are medians of "
        f"{len(results.bounds)} rounds in which all take turns. Memory was copied at "
        f"{copied:.0f} GB/s (read and written)."
    )
    parts = [setting, table(results), servers_table(results), sentences(results)]
    names = {server.name for server in results.servers}
    parts += [
        beside_peer(results, peer, goals)
        for peer, goals in PEER_GOALS.items()
        if {peer, goals.own} <= names
    ]
    return "\n\n".join(parts)


def table(results: Results) -> str:
    names = [server.name for server in results.servers]
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
    for server in results.servers:
        rates = [f"{n * 1000 / results.ms(server.name, n):.0f}" for n in results.loads]
        lines.append((server.name, f"{server.start_s:.1f}", f"{server.pss_mb:,.0f}", *rates))
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
    return " ".join(parts)


def beside_peer(results: Results, peer: str, goals: _Goals) -> str:
    """Baton's figures over the peer's, and whether each reaches its goal."""
    own, other = results.server(goals.own), results.server(peer)
    parts = [
        _ratio(
            f"tokens/s at {streams}", results.ms(peer, streams) / results.ms(own.name, streams),
            least=goals.rates.get(streams),
        )
        for streams in results.loads
    ]  # fmt: skip
    ttft = results.ms(own.name, 0) / results.ms(peer, 0)
    parts.append(_ratio("a prompt's TTFT", ttft, most=goals.ttft))
    parts.append(_ratio("start", own.start_s / other.start_s, most=goals.start))
    parts.append(_ratio("memory", own.pss_mb / other.pss_mb, most=goals.memory))
    return f"*{own.name}* over *{peer}*: {'; '.join(parts)}."


def _ratio(
    what: str, value: float, *, least: float | None = None, most: float | None = None
) -> str:
    goal, said = "", ""
    if least is not None:
        goal, said = f"at least {least:g}", "reached" if value >= least else "missed"
    elif most is not None:
        goal, said = f"at most {most:g}", "reached" if value <= most else "missed"
    return f"{what} **{value:.2f}**" + (f" (goal {goal}: {said})" if goal else "")
