"""What the interference experiment measured, as it is kept in a file.

A *round* is one system, started afresh, under the round's load. Figures of a system are medians
over its rounds. A *gap* is the time between two tokens of a stream; ITL is their distribution.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from benchmarks.chat_stream import ChatStream
from benchmarks.figures import percentile
from benchmarks.interference.client import Load, Observed
from benchmarks.interference.systems import System
from benchmarks.measured import Measured
from benchmarks.page import KeptResults

PERCENTS = (50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 100.0)
PAUSE_S = 0.1
"""A gap that is longer is a pause, which a reader sees."""
SLOT_S = 0.25


@dataclass(frozen=True, slots=True)
class Round:
    """Times as they are named."""

    system: str
    round: int
    itl_ms: tuple[float, ...]
    """At each of ``PERCENTS``."""
    num_gaps: int
    paused_share: float
    """Of the streams' time, that in gaps over ``PAUSE_S``."""
    ttft_s: tuple[float, ...]
    """Of the long prompts, in order of arrival. One without a first token counts with the time
    that it was waited for."""
    num_overdue: int
    num_failed: int
    streams_tokens_per_s: float
    """Of the streams while prompts came."""
    step_ms: float
    """While the saturating streams decode and no prompt comes."""
    start_s: float
    pss_mb: float
    """After the load."""
    longest_ms: tuple[float, ...]
    """Of the gaps that ended in each slot of ``SLOT_S``; 0 where none did. Of the first round."""

    def itl(self, percent: float) -> float:
        return self.itl_ms[PERCENTS.index(percent)]

    def ttft(self, percent: float) -> float:
        return percentile(self.ttft_s, percent) or 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """Around a round's measurements."""

    system: str
    round: int
    step_ms: float
    start_s: float
    pss_mb: float


def round_of(setting: Setting, observed: Observed, *, bound_s: float) -> Round:
    """Raises ValueError where no stream decoded."""
    gaps = _gaps(observed)
    lengths = [gap for _, gap in gaps]
    if not lengths:
        raise ValueError(f"{setting.system}: no token came while prompts did")
    times = (percentile(lengths, percent) or 0.0 for percent in PERCENTS)
    return Round(
        system=setting.system,
        round=setting.round,
        itl_ms=tuple(round(time * 1000, 2) for time in times),
        num_gaps=len(gaps),
        paused_share=round(sum(g for g in lengths if g > PAUSE_S) / sum(lengths), 4),
        ttft_s=tuple(round(_ttft_s(prompt, bound_s), 4) for prompt in observed.prompts),
        num_overdue=observed.num_overdue,
        num_failed=observed.num_failed,
        streams_tokens_per_s=round(len(gaps) / (observed.ended_at - observed.began_at), 1),
        step_ms=round(setting.step_ms, 2),
        start_s=round(setting.start_s, 1),
        pss_mb=round(setting.pss_mb),
        longest_ms=_longest(gaps, observed) if setting.round == 0 else (),
    )


def _ttft_s(prompt: ChatStream, bound_s: float) -> float:
    return bound_s if prompt.ttft_s is None else prompt.ttft_s


def _gaps(observed: Observed) -> list[tuple[float, float]]:
    """When each ended, since the beginning, and how long it was."""
    found = []
    for stream in observed.streams:
        moment = stream.began_at + (stream.ttft_s or 0.0)
        for gap in stream.gaps_s:
            moment += gap
            if observed.began_at <= moment <= observed.ended_at:
                found.append((moment - observed.began_at, gap))
    return found


def _longest(gaps: Sequence[tuple[float, float]], observed: Observed) -> tuple[float, ...]:
    slots = [0.0] * (int((observed.ended_at - observed.began_at) / SLOT_S) + 1)
    for moment, gap in gaps:
        slot = int(moment / SLOT_S)
        slots[slot] = max(slots[slot], round(gap * 1000, 1))
    return tuple(slots)


@dataclass(frozen=True, slots=True)
class Tried:
    """A chunk size of the sweep."""

    max_num_batched_tokens: int
    itl_p50_ms: float
    itl_p99_ms: float
    ttft_p90_s: float


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    load: Load
    prompt_tokens: int
    """Of a long prompt, with the chat's own; the most that a server counted."""
    arrivals_s: tuple[float, ...]
    """Of the first round."""
    num_rounds: int
    vllm_version: str
    """Empty where it was left out."""
    tried: tuple[Tried, ...]
    """Empty where the chunk size was given."""
    systems: tuple[System, ...]
    rounds: tuple[Round, ...]

    def of(self, system: str) -> list[Round]:
        return [each for each in self.rounds if each.system == system]

    def has(self, system: str) -> bool:
        return bool(self.of(system))

    def itl_ms(self, system: str, percent: float) -> float:
        return statistics.median(each.itl(percent) for each in self.of(system))

    def ttft_s(self, system: str, percent: float) -> float:
        return statistics.median(each.ttft(percent) for each in self.of(system))

    def tokens_per_s(self, system: str) -> float:
        """At the saturating number of streams."""
        step_ms = statistics.median(each.step_ms for each in self.of(system))
        return self.load.num_saturating * 1000 / step_ms

    def median(self, system: str, figure: str) -> float:
        """Of a field of Round."""
        return float(statistics.median(getattr(each, figure) for each in self.of(system)))

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "load": Load(**data["load"]),
                "arrivals_s": tuple(data["arrivals_s"]),
                "tried": tuple(Tried(**each) for each in data["tried"]),
                "systems": tuple(System(**each) for each in data["systems"]),
                "rounds": tuple(_round_from_json(each) for each in data["rounds"]),
            }
        )


def _round_from_json(data: dict[str, Any]) -> Round:
    lists = {name: tuple(data[name]) for name in ("itl_ms", "ttft_s", "longest_ms")}
    return Round(**{**data, **lists})
