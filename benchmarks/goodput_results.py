"""What a sweep measured: the figures of every run, as they are kept in a file.

A *run* is one system at one rate in one round. A cell of the report is a system at a
rate: the median over the rounds of each round's figure, and its range.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from benchmarks.arrivals import Load
from benchmarks.figures import Objectives, Record, figures_of
from benchmarks.measured import Measured
from benchmarks.page import KeptResults, read_json


@dataclass(frozen=True, slots=True)
class Run:
    """With every request."""

    system: str
    round: int
    rate_per_s: float
    window_s: float
    duration_s: float
    """From the window's beginning until the last request was over."""
    client_cpu_s: float
    """What the load's own process took of the machine in that time."""
    records: tuple[Record, ...]

    @property
    def took_s(self) -> float:
        """What goodput and tokens/s are over: the window, or longer where a request was over
        later. So neither is ever more than what was offered."""
        return max(self.window_s, self.duration_s)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "records": [record.to_json() for record in self.records]}


def run_from_json(data: dict[str, Any]) -> Run:
    """Raises KeyError or TypeError for anything else."""
    return Run(**{**data, "records": tuple(map(Record.from_json, data["records"]))})


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What a run came to."""

    system: str
    round: int
    rate_per_s: float
    num_requests: int
    num_good: int
    num_missed_ttft: int
    num_missed_itl: int
    """Of those that did not fail; one request may miss both."""
    num_overdue: int
    num_failed: int
    num_tokens: int
    took_s: float
    """What goodput and tokens/s are over."""
    good_share: float
    good_share_on_average: float
    goodput_per_s: float
    chat_ttft_p50_s: float | None
    chat_ttft_p90_s: float | None
    long_ttft_p50_s: float | None
    long_ttft_p90_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    tokens_per_s: float

    @classmethod
    def of(cls, run: Run, objectives: Objectives) -> Self:
        whole, chat, long = (
            figures_of(
                [record for record in run.records if record.kind in kinds],
                objectives,
                duration_s=run.took_s,
            )
            for kinds in (("chat", "long"), ("chat",), ("long",))
        )
        measured = [record for record in run.records if record.outcome != "failed"]
        return cls(
            system=run.system,
            round=run.round,
            rate_per_s=run.rate_per_s,
            num_requests=whole.num_requests,
            num_good=whole.num_good,
            num_missed_ttft=sum(not objectives.ttft_met_by(record) for record in measured),
            num_missed_itl=sum(not objectives.itl_met_by(record) for record in measured),
            num_overdue=whole.num_overdue,
            num_failed=whole.num_failed,
            num_tokens=whole.num_tokens,
            took_s=_rounded(run.took_s),
            good_share=_rounded(whole.good_share),
            good_share_on_average=_rounded(whole.good_share_on_average),
            goodput_per_s=_rounded(whole.goodput_per_s),
            chat_ttft_p50_s=chat.ttft_s[50],
            chat_ttft_p90_s=chat.ttft_s[90],
            long_ttft_p50_s=long.ttft_s[50],
            long_ttft_p90_s=long.ttft_s[90],
            itl_p50_s=whole.itl_s[50],
            itl_p99_s=whole.itl_s[99],
            tokens_per_s=_rounded(whole.tokens_per_s),
        )


def _rounded(value: float) -> float:
    return round(value, 6)


@dataclass(frozen=True, slots=True)
class System:
    name: str
    label: str
    arguments: tuple[str, ...]
    """Of ``baton serve``."""
    kv_cache_bytes: int
    """Of each worker."""
    max_num_batched_tokens: int = 512
    """Of each worker: the size of a prefill chunk. Results that do not say had the default."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of Baton's configuration."""
        return {
            "engine": {
                "kv_cache_bytes": self.kv_cache_bytes,
                "max_num_batched_tokens": self.max_num_batched_tokens,
            }
        }


@dataclass(frozen=True, slots=True)
class Results(KeptResults):
    measured: Measured
    seed: int
    load: Load
    objectives: Objectives
    systems: tuple[System, ...]
    """The disaggregated one first."""
    num_rounds: int
    """Rounds in which every system ran at every rate."""
    client_cores: float
    """That the load's own process took, on average."""
    max_late_s: float
    """How far behind its schedule it ever was."""
    runs: tuple[RunFigures, ...]

    @property
    def rates(self) -> list[float]:
        return sorted({run.rate_per_s for run in self.runs})

    @property
    def num_requests(self) -> int:
        """Of a system at a rate in a round."""
        return self.runs[0].num_requests

    def of(self, system: str, rate: float) -> list[RunFigures]:
        return [run for run in self.runs if run.system == system and run.rate_per_s == rate]

    def each(self, system: str, rate: float, figure: str) -> list[float]:
        """A field of RunFigures, one value for each round that has it."""
        values = (getattr(run, figure) for run in self.of(system, rate))
        return [value for value in values if value is not None]

    def median(self, system: str, rate: float, figure: str) -> float | None:
        """Over the rounds in which there is such a figure."""
        return median(self.each(system, rate, figure))

    def fairest(self, systems: Iterable[str]) -> str:
        """Of ``systems`` the one with the most good requests in all; the first of equals."""
        good = {
            name: sum(run.num_good for run in self.runs if run.system == name) for name in systems
        }
        return max(good, key=lambda name: good[name])

    @classmethod
    def of_requests(cls, path: Path) -> Self:
        """The results at ``path``, with the figures made anew of the requests beside them, so
        that another definition of a figure takes no other sweep. Raises OSError or ValueError."""
        runs = read_json(requests_beside(path), _runs_from_json)
        kept = read_json(path, lambda data: cls._from_json({**data, "runs": ()}))
        return replace(kept, runs=tuple(RunFigures.of(run, kept.objectives) for run in runs))

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "measured": Measured(**data["measured"]),
                "load": Load(**data["load"]),
                "objectives": Objectives(**data["objectives"]),
                "systems": tuple(
                    System(**{**each, "arguments": tuple(each["arguments"])})
                    for each in data["systems"]
                ),
                "runs": tuple(RunFigures(**each) for each in data["runs"]),
            }
        )


def requests_beside(path: Path) -> Path:
    """Where every request of the results at ``path`` is kept."""
    return path.with_name(f"{path.stem}-requests.json")


def _runs_from_json(data: dict[str, Any]) -> tuple[Run, ...]:
    return tuple(map(run_from_json, data["runs"]))


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
