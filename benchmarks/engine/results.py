"""What ``benchmarks.engine.compare`` has found out, as it is kept; nothing here needs torch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from typing import Any, Self

from benchmarks.measured import Measured
from benchmarks.page import KeptResults


@dataclass(frozen=True, slots=True)
class Bound:
    """What the machine could do at best. Times are medians, in ms."""

    threads: int
    decode_ms: dict[str, float]
    """By rows: one step."""
    prompt_tokens: int
    prompt_ms: float
    copy_gb_s: float
    """Bytes read and as many written, by all threads."""
    packed: str = "for oneDNN"
    """How the weights of its products are."""
    own_decode_ms: dict[str, float] = field(default_factory=dict)
    """The same products as the engine has them."""
    own_prompt_ms: float = 0.0

    def faster(self) -> Self:
        """With the times of whichever products are faster."""
        return replace(
            self,
            decode_ms={
                rows: min(ms, self.own_decode_ms[rows]) for rows, ms in self.decode_ms.items()
            },
            prompt_ms=min(self.prompt_ms, self.own_prompt_ms),
            packed="for oneDNN or as the engine has them, whichever is faster",
        )


@dataclass(frozen=True, slots=True)
class Outside:
    """A decode step's parts, medians over the steps, in ms."""

    sampling: str
    """How tokens were drawn: greedily, with a temperature, with top_p too."""
    rows: int
    step_ms: float
    """As the worker takes it."""
    model_ms: float
    """From token ids to logits."""
    draw_ms: float
    """From logits to tokens."""
    outside_ms: float
    """All but the model, so the draw too."""


@dataclass(frozen=True, slots=True)
class Server:
    """One start of it."""

    name: str
    start_s: float
    pss_mb: float
    """After the last measurement."""
    version: str = ""


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
    outsides: tuple[Outside, ...] = ()
    kv_tokens: int | None = None
    """That each server has room for."""

    @property
    def names(self) -> list[str]:
        """Of the servers, in the order of their first starts."""
        return list(dict.fromkeys(server.name for server in self.servers))

    def server(self, name: str) -> Server:
        """Its starts' medians."""
        starts = [server for server in self.servers if server.name == name]
        return Server(
            name,
            statistics.median(start.start_s for start in starts),
            statistics.median(start.pss_mb for start in starts),
            starts[0].version,
        )

    @property
    def loads(self) -> list[int]:
        return sorted({sample.streams for sample in self.samples if sample.streams})

    def ms(self, server: str, streams: int) -> float:
        """The median over rounds; of 0 streams the TTFT."""
        return statistics.median(
            s.ms for s in self.samples if s.server == server and s.streams == streams
        )

    def tokens_per_s(self, server: str, streams: int) -> float:
        """Of all streams together while all of them decode."""
        return streams * 1000 / self.ms(server, streams)

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
                "outsides": tuple(Outside(**each) for each in data.get("outsides", ())),
            }
        )
