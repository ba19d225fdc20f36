"""What a load's requests come to: percentiles, tokens/s and goodput against objectives.

- TTFT: the request's beginning to its first token. ITL: each gap between tokens. TPOT: the
  mean gap of one request. End to end: its beginning to the end of its stream.
- A request is *good* if it was answered whole, its TTFT is within the objective, and
  so is its ITL at the percentile of the objective. Goodput is the good requests over the
  time that the run took, as tokens/s are: what ``vllm bench serve`` calls request goodput.
- Percentiles are by nearest rank: each is a value that was measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from benchmarks.chat_stream import ChatStream, RequestFailed

QUANTILES = (50, 90, 99)


def percentile(values: Iterable[float], percent: float) -> float | None:
    """By nearest rank, ``percent`` within 0 and 100; None of nothing."""
    ranked = sorted(values)
    if not ranked:
        return None
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Its times are seconds."""

    kind: str
    began_at_s: float
    """Since the run's beginning."""
    outcome: Literal["whole", "failed", "overdue"]
    """Overdue: given up at its bound, so the figures are what had come until then."""
    ttft_s: float | None
    gaps_s: tuple[float, ...]
    e2e_s: float
    num_prompt_tokens: int | None
    num_cached_tokens: int | None
    num_tokens: int
    counted_by: str
    failure: str = ""
    failure_kind: str = ""
    late_s: float = 0.0
    """How far behind the schedule it was sent; ``ttft_s`` counts from the schedule."""

    @property
    def tpot_s(self) -> float | None:
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else None

    def to_json(self) -> dict[str, Any]:
        """Times to the microsecond: smaller files, and no worse figures."""
        data = asdict(self)
        data["gaps_s"] = [round(gap, 6) for gap in self.gaps_s]
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        return cls(**{**data, "gaps_s": tuple(data["gaps_s"])})


def record_of(
    stream: ChatStream,
    kind: str,
    *,
    run_began_at: float,
    now: float,
    failure: RequestFailed | None = None,
    overdue: bool = False,
    late_s: float = 0.0,
) -> Record:
    """The record of a request that ended ``now``, on the stream's clock."""
    so_far_s = now - stream.began_at
    return Record(
        kind=kind,
        began_at_s=stream.began_at - run_began_at,
        outcome="overdue" if overdue else "failed" if failure else "whole",
        ttft_s=so_far_s if overdue and stream.ttft_s is None else stream.ttft_s,
        gaps_s=tuple(stream.gaps_s),
        e2e_s=so_far_s if stream.e2e_s is None else stream.e2e_s,
        num_prompt_tokens=stream.num_prompt_tokens,
        num_cached_tokens=stream.num_cached_tokens,
        num_tokens=stream.num_tokens,
        counted_by=stream.counted_by,
        failure=str(failure or ""),
        failure_kind=failure.kind if failure else "",
        late_s=late_s,
    )


@dataclass(frozen=True, slots=True)
class Objectives:
    ttft_s: float
    itl_s: float
    itl_percentile: float = 99.0
    """Of a request's own gaps; under 100 of them, the 99th is the longest."""

    def met_by(self, record: Record) -> bool:
        return self._begun_in_time(record) and self.itl_met_by(record)

    def met_on_average_by(self, record: Record) -> bool:
        """The same with TPOT in the place of ITL: a single pause may hide in it."""
        return self._begun_in_time(record) and (record.tpot_s or 0.0) <= self.itl_s

    def ttft_met_by(self, record: Record) -> bool:
        """Whatever came of it after its first token."""
        return record.ttft_s is not None and record.ttft_s <= self.ttft_s

    def itl_met_by(self, record: Record) -> bool:
        """By the gaps that there were."""
        itl_s = percentile(record.gaps_s, self.itl_percentile)
        return itl_s is None or itl_s <= self.itl_s

    def _begun_in_time(self, record: Record) -> bool:
        return record.outcome == "whole" and self.ttft_met_by(record)


Percentiles = dict[int, float | None]


@dataclass(frozen=True, slots=True)
class Figures:
    """Of some requests. Percentiles are of whole and overdue ones, in seconds."""

    num_requests: int
    num_whole: int
    num_failed: int
    num_overdue: int
    num_good: int
    num_good_on_average: int
    num_tokens: int
    duration_s: float
    """What goodput and tokens/s are over."""
    ttft_s: Percentiles
    itl_s: Percentiles
    tpot_s: Percentiles
    e2e_s: Percentiles
    failures: Mapping[str, int]
    counted_by: frozenset[str]

    @property
    def good_share(self) -> float:
        return self.num_good / self.num_requests if self.num_requests else 0.0

    @property
    def good_share_on_average(self) -> float:
        return self.num_good_on_average / self.num_requests if self.num_requests else 0.0

    @property
    def goodput_per_s(self) -> float:
        return self.num_good / self.duration_s if self.duration_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of all requests, failed ones included."""
        return self.num_tokens / self.duration_s if self.duration_s else 0.0


def figures_of(
    records: Sequence[Record], objectives: Objectives, *, duration_s: float | None = None
) -> Figures:
    """``duration_s`` is what goodput and tokens/s are over, by default from the first
    request's beginning to the last one's end."""
    measured = [record for record in records if record.outcome != "failed"]
    ttfts = [record.ttft_s for record in measured if record.ttft_s is not None]
    tpots = [record.tpot_s for record in measured if record.tpot_s is not None]
    outcomes = Counter(record.outcome for record in records)
    return Figures(
        num_requests=len(records),
        num_whole=outcomes["whole"],
        num_failed=outcomes["failed"],
        num_overdue=outcomes["overdue"],
        num_good=sum(objectives.met_by(record) for record in records),
        num_good_on_average=sum(objectives.met_on_average_by(record) for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        duration_s=_span_s(records) if duration_s is None else duration_s,
        ttft_s=_percentiles(ttfts),
        itl_s=_percentiles([gap for record in measured for gap in record.gaps_s]),
        tpot_s=_percentiles(tpots),
        e2e_s=_percentiles([record.e2e_s for record in measured]),
        failures=dict(Counter(record.failure for record in records if record.failure)),
        counted_by=frozenset(record.counted_by for record in records if record.num_tokens),
    )


def _span_s(records: Sequence[Record]) -> float:
    ends = [record.began_at_s + record.e2e_s for record in records]
    return max(ends) - min(record.began_at_s for record in records) if records else 0.0


def _percentiles(values: Sequence[float]) -> Percentiles:
    return {percent: percentile(values, percent) for percent in QUANTILES}
