"""What a sweep measured, as it is kept in a file, and the figures that are drawn from it.

A *run* is one system at one rate in one round. A cell of the report is a system at a
rate: the median over the rounds of each round's figure.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.arrivals import Load
from benchmarks.figures import Figures, Objectives, Record, figures_of

Figure = Callable[[Figures], float | None]


@dataclass(frozen=True, slots=True)
class Run:
    system: str
    round: int
    rate_per_s: float
    window_s: float
    duration_s: float
    """The window, and until the last request was over."""
    client_cpu_s: float
    """What the load's own process took of the machine in that time."""
    records: tuple[Record, ...]

    def figures(self, objectives: Objectives, kind: str | None = None) -> Figures:
        records = [each for each in self.records if kind in (None, each.kind)]
        return figures_of(records, objectives, duration_s=self.window_s)


@dataclass(frozen=True, slots=True)
class System:
    name: str
    label: str
    arguments: tuple[str, ...]
    """Of ``baton serve``."""
    kv_cache_bytes: int
    """Of each worker."""


@dataclass(frozen=True, slots=True)
class Results:
    begun_at: str
    machine: dict[str, Any]
    command: str
    seed: int
    load: Load
    objectives: Objectives
    systems: tuple[System, ...]
    num_rounds: int
    """Rounds in which every system ran at every rate."""
    runs: tuple[Run, ...]

    @property
    def rates(self) -> list[float]:
        return sorted({run.rate_per_s for run in self.runs})

    def of(self, system: str, rate: float) -> list[Run]:
        return [run for run in self.runs if run.system == system and run.rate_per_s == rate]

    def median(
        self, system: str, rate: float, figure: Figure, kind: str | None = None
    ) -> float | None:
        """Over the rounds in which there is such a figure."""
        return median(self.each(system, rate, figure, kind))

    def each(
        self, system: str, rate: float, figure: Figure, kind: str | None = None
    ) -> list[float]:
        """One value a round."""
        values = (figure(run.figures(self.objectives, kind)) for run in self.of(system, rate))
        return [value for value in values if value is not None]

    def fairest(self, systems: Iterable[str]) -> str:
        """Of ``systems`` the one with the most good requests in all; the first of equals."""
        good = {
            name: sum(
                run.figures(self.objectives).num_good for run in self.runs if run.system == name
            )
            for name in systems
        }
        return max(good, key=lambda name: good[name])

    def write(self, path: Path) -> None:
        data = asdict(self)
        for plain, run in zip(data["runs"], self.runs, strict=True):
            plain["records"] = [record.to_json() for record in run.records]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises OSError, or ValueError for a file that is none of ours."""
        data = json.loads(path.read_text())
        try:
            return cls(
                **{
                    **data,
                    "load": Load(**data["load"]),
                    "objectives": Objectives(**data["objectives"]),
                    "systems": tuple(
                        System(**{**each, "arguments": tuple(each["arguments"])})
                        for each in data["systems"]
                    ),
                    "runs": tuple(run_from_json(each) for each in data["runs"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of this version: {error}") from None


def run_from_json(data: dict[str, Any]) -> Run:
    """Raises KeyError or TypeError for anything else."""
    return Run(**{**data, "records": tuple(map(Record.from_json, data["records"]))})


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
