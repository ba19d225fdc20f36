"""Hand-offs beside their bounds, as tables of rates and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.handoff.cases import COPY_CORE, PREFILL_CORE
from benchmarks.handoff.shapes import SHAPES
from benchmarks.measured import Measured
from benchmarks.page import KeptResults, markdown_table

MEMCPY, BARE_GLOO, CONTIGUOUS = "memcpy", "gather + gloo + scatter", "contiguous gloo"
BARE_NIXL = "NIXL alone"
BOUNDS = {"shared_memory": MEMCPY, "nixl": BARE_NIXL, "gloo": BARE_GLOO}
"""What each transport is measured against, in the same rounds. Another is shown without."""
GOALS = {"shared_memory": 0.85, "nixl": 0.9, "gloo": 0.9}
"""Of the bound's rate, at least."""
EXPOSED_GOAL = 0.05
"""Of TTFT, at most."""
_BESIDE = (
    "What copying costs the decode steps beside it: an engine decodes 4 streams on one core while "
    "blocks are copied on the other without a pause, by the transport's thread in the same process "
    "or, to tell the interpreter's lock from the memory's bandwidth, by another process. (A chunk "
    "of 512 tokens takes a millisecond.)"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender, once."""

    shape: str
    tokens: int
    requests: int
    at_once: int
    contender: str
    num_bytes: int
    moved_s: float
    """Copying alone: while the transport had something posted that had not ended."""
    whole_s: float
    """From the first announcement to the last READY."""
    ready_ms: float
    """Median over requests, from announcement and commit to READY."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request to a server of one prefill and one decode worker."""

    transport: str
    tokens: int
    ttft_ms: float
    ready_ms: float
    """From the commit record's arrival to READY, by the worker's metric."""
    exposed_ms: float
    """What the second token came later than the third and following, by the timeline."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Some decode steps of an engine while this copies blocks of the real model's shape."""

    copier: str
    p50_ms: float
    p99_ms: float
    copy_gb_s: float


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    rounds: int
    pool_bytes: int
    samples: tuple[Sample, ...]
    served: tuple[Served, ...]
    beside: tuple[Beside, ...]
    absent: dict[str, str]
    """Transports that cannot work here, and why."""

    @property
    def transports(self) -> list[str]:
        bounds = (MEMCPY, BARE_GLOO, CONTIGUOUS, BARE_NIXL)
        return list(dict.fromkeys(s.contender for s in self.samples if s.contender not in bounds))

    @property
    def cases(self) -> list[tuple[str, int, int, int]]:
        """Shape, tokens, requests, of them at once."""
        return list(dict.fromkeys((s.shape, s.tokens, s.requests, s.at_once) for s in self.samples))

    def of(self, case: tuple[str, int, int, int], contender: str) -> list[Sample]:
        """The rounds of a case; empty for who was not measured."""
        return [
            s
            for s in self.samples
            if (s.shape, s.tokens, s.requests, s.at_once, s.contender) == (*case, contender)
        ]

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "samples": tuple(Sample(**each) for each in data["samples"]),
                "served": tuple(Served(**each) for each in data["served"]),
                "beside": tuple(Beside(**each) for each in data["beside"]),
            }
        )


def section(results: Results) -> str:
    """The whole report."""
    parts = [_setting(results)]
    for transport in results.transports:
        parts += [f"**{transport}**", table(results, transport), verdict(results, transport)]
    for transport, reason in results.absent.items():
        parts.append(f"**{transport}** is not measured here: {reason}.")
    if results.served:
        parts += [_served_setting(), served_table(results), served_verdict(results)]
    if results.beside:
        parts += [_BESIDE, beside_table(results)]
    return "\n\n".join(parts)


def _setting(results: Results) -> str:
    shapes = ", ".join(
        f"{shape.title} ({shape.layout(1).token_bytes / 1024:g} KiB a token, "
        f"{shape.layout(1).block_bytes / 1024:,.0f} KiB a block of 16)"
        for shape in SHAPES.values()
        if any(s.shape == shape.name for s in results.samples)
    )
    return (
        f"{results.measured.sentence} KV of the shapes of {shapes}, in bfloat16. A prefill "
        f"process, pinned to core {PREFILL_CORE}, hands requests over to a decode process as "
        "workers do, each announced in pieces of at most 64 MiB and committed at once; what copies "
        "in the decode process, memcpy and bare gloo too, and the reader of NIXL alone are pinned "
        f"to core {COPY_CORE}, the "
        "decode process' event loop runs where there is room. Lists of free blocks are shuffled on "
        "both sides, so that hardly two blocks are neighbours. Pools have "
        f"{results.pool_bytes / 2**30:g} GiB; requests for which they have no room follow in "
        "waves, whose times are added up. *Moving* is while the transport has something to copy, "
        "from its posting to decode's hearing of its end; *whole* is from the first announcement "
        "to the last READY, so it has every message of the protocol in it; *to READY* is one "
        "request's, from its announcement and commit. memcpy reads and writes the same pages as "
        "the shared-memory transport, by one thread; *NIXL alone* is one read of all blocks by a "
        "bare agent in a process of its own, asked after without a pause. Rates are bytes moved; "
        "they are medians of "
        f"{results.rounds} rounds in which all take turns."
    )


def _rate(samples: Sequence[Sample], *, whole: bool = False) -> float:
    """GB/s."""
    return statistics.median(
        s.num_bytes / (s.whole_s if whole else s.moved_s) / 1e9 for s in samples
    )


def ratio(
    results: Results, case: tuple[str, int, int, int], transport: str, *, whole: bool = False
) -> float | None:
    """Of the bound's rate; None for a transport without one."""
    bound = results.of(case, BOUNDS.get(transport, ""))
    own = results.of(case, transport)
    return _rate(own, whole=whole) / _rate(bound) if bound and own else None


def table(results: Results, transport: str) -> str:
    bound = BOUNDS.get(transport)
    if not any(results.of(case, bound or "") for case in results.cases):
        bound = None
    goal = f"of it (goal {GOALS[transport]:g})" if bound else ""
    heads = ["KV of", "tokens", "requests"]
    heads += [f"{bound} GB/s"] if bound else []
    heads += [
        "moving GB/s",
        *([goal] if bound else []),
        "whole GB/s",
        *(["of it"] if bound else []),
    ]
    heads += ["contiguous GB/s", "moving, of it"] if transport == "gloo" else []
    lines: list[Sequence[str]] = [[*heads, "to READY ms"]]
    for case in results.cases:
        own = results.of(case, transport)
        if own:
            lines.append(_line(results, case, transport, own))
    return markdown_table(lines)


def _line(
    results: Results, case: tuple[str, int, int, int], transport: str, own: Sequence[Sample]
) -> list[str]:
    shape, tokens, requests, at_once = case
    bound = results.of(case, BOUNDS.get(transport, ""))
    moving, whole = _rate(own), _rate(own, whole=True)
    cells = [
        SHAPES[shape].title,
        f"{tokens:,}",
        str(requests) if at_once == requests else f"{requests}, {at_once} at once",
    ]
    if bound:
        rate = _rate(bound)
        cells += [f"{rate:.1f}", f"{moving:.1f}", f"{moving / rate:.2f}"]
        cells += [f"{whole:.1f}", f"{whole / rate:.2f}"]
    else:
        cells += [f"{moving:.1f}", f"{whole:.1f}"]
    if transport == "gloo":
        contiguous = _rate(results.of(case, CONTIGUOUS))
        cells += [f"{contiguous:.1f}", f"{moving / contiguous:.2f}"]
    return [*cells, f"{statistics.median(s.ready_ms for s in own):.1f}"]


def verdict(results: Results, transport: str) -> str:
    """How often the goal is reached, and where it is missed by most."""
    cases = [case for case in results.cases if results.of(case, transport)]
    found = [(ratio(results, case, transport), case) for case in cases]
    known = [(value, case) for value, case in found if value is not None]
    if not known:
        return f"The bare transfer of {transport} is not measured here, so it has no goal."
    goal = GOALS[transport]
    least, (shape, tokens, requests, _) = min(known)
    reached = sum(value >= goal for value, _ in known)
    wholes = [ratio(results, case, transport, whole=True) for _, case in known]
    reached_whole = sum(value is not None and value >= goal for value in wholes)
    whose = "1 request" if requests == 1 else f"{requests} requests"
    return (
        f"Moving goes at {least:.2f} to {max(known)[0]:.2f} of {BOUNDS[transport]}: the goal of "
        f"{goal:g} is reached in {reached} of {len(known)} cases; least with {whose} of "
        f"{tokens:,} tokens of {SHAPES[shape].title}. The whole hand-off, with its messages, goes "
        f"as fast as the goal asks of moving in {reached_whole} of {len(known)}."
    )


def _served_setting() -> str:
    return (
        "*Exposed* hand-off, over HTTP: one prefill and one decode worker with the real model in "
        "bfloat16, not pinned, one request of random tokens at a time. *Commit to READY* is the "
        "decode worker's metric; *exposed* is what the gap before the second token was longer "
        "than the gaps after it, which holds the decode worker's first step too."
    )


def _served(results: Results) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Medians of TTFT, commit to READY and exposed, in ms."""
    found = {}
    for case in dict.fromkeys((s.transport, s.tokens) for s in results.served):
        own = [s for s in results.served if (s.transport, s.tokens) == case]
        found[case] = (
            statistics.median(s.ttft_ms for s in own),
            statistics.median(s.ready_ms for s in own),
            statistics.median(s.exposed_ms for s in own),
        )
    return found


def served_table(results: Results) -> str:
    lines: list[Sequence[str]] = [
        (
            *("transport", "tokens", "TTFT ms", "commit to READY ms", "of TTFT"),
            *("exposed ms", f"of TTFT (goal {EXPOSED_GOAL:.0%})"),
        )
    ]
    for (transport, tokens), (ttft, ready, exposed) in _served(results).items():
        lines.append(
            (
                *(transport, f"{tokens:,}", f"{ttft:,.0f}", f"{ready:.1f}", f"{ready / ttft:.1%}"),
                *(f"{exposed:.1f}", f"{exposed / ttft:.1%}"),
            )
        )
    return markdown_table(lines)


def served_verdict(results: Results) -> str:
    shares = {case: exposed / ttft for case, (ttft, _, exposed) in _served(results).items()}
    (transport, tokens), most = max(shares.items(), key=lambda item: item[1])
    said = "reached" if most <= EXPOSED_GOAL else "missed"
    return (
        f"The most that a hand-off exposes is {most:.1%} of TTFT, with {tokens:,} tokens over "
        f"{transport} (the goal of {EXPOSED_GOAL:.0%} is {said})."
    )


def beside_table(results: Results) -> str:
    lines: list[Sequence[str]] = [("copied by", "copied GB/s", "step p50 ms", "step p99 ms")]
    for copier in dict.fromkeys(each.copier for each in results.beside):
        own = [each for each in results.beside if each.copier == copier]
        rate = statistics.median(each.copy_gb_s for each in own)
        lines.append(
            (
                *(copier, f"{rate:.1f}" if rate else "-"),
                f"{statistics.median(each.p50_ms for each in own):.1f}",
                f"{statistics.median(each.p99_ms for each in own):.1f}",
            )
        )
    return markdown_table(lines)
