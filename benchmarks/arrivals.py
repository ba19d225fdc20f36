"""An open-loop load, written down before it is run: who asks what, and when.

Arrivals are a Poisson process given how many there are: so many moments, uniform over
the window, in order. So the rate offered is exactly the rate asked for, and bursts are
as natural. The share of long prompts is exact too; which ones they are is random.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from benchmarks import prompts
from benchmarks.prompts import Message

Kind = Literal["chat", "long"]


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    """Since the phase's beginning."""
    kind: Kind
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Phase:
    """One rate, for one window."""

    rate_per_s: float
    window_s: float
    arrivals: list[Arrival]


@dataclass(frozen=True, slots=True)
class Load:
    """What all phases have in common."""

    long_share: float
    long_tokens: int
    answer_tokens: int
    """Of every answer, exactly: ``ignore_eos``."""
    bound_s: float
    """After so long a request is given up as overdue."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``warm_up`` comes before the phases, one by one, and is not measured."""

    load: Load
    warm_up: list[list[Message]]
    phases: list[Phase]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        data: dict[str, Any] = json.loads(path.read_text())
        phases = [
            Phase(**{**phase, "arrivals": [Arrival(**each) for each in phase["arrivals"]]})
            for phase in data["phases"]
        ]
        return cls(Load(**data["load"]), data["warm_up"], phases)


def make_plan(seed: str, load: Load, *, rates: list[float], num_requests: int) -> Plan:
    """A phase of ``num_requests`` for each rate. A function of its arguments alone; no two of
    its prompts begin alike."""
    random = prompts.rng(seed, "warm-up")
    warm_up = [_messages(prompts.opening(random))]
    warm_up.append(_messages(prompts.document_opening(random, load.long_tokens)))
    phases = [make_phase(seed, load, rate_per_s=rate, num_requests=num_requests) for rate in rates]
    return Plan(load, warm_up, phases)


def make_phase(seed: str, load: Load, *, rate_per_s: float, num_requests: int) -> Phase:
    """As long as so many requests take at that rate."""
    random = prompts.rng(seed, rate_per_s)
    window_s = num_requests / rate_per_s
    num_long = round(load.long_share * num_requests)
    kinds: list[Kind] = ["long" if index < num_long else "chat" for index in range(num_requests)]
    random.shuffle(kinds)
    moments = sorted(random.uniform(0, window_s) for _ in range(num_requests))
    arrivals = []
    for at_s, kind in zip(moments, kinds, strict=True):
        long = kind == "long"
        text = prompts.document_opening(random, load.long_tokens) if long else _chat(random)
        arrivals.append(Arrival(at_s, kind, _messages(text)))
    return Phase(rate_per_s, window_s, arrivals)


def _chat(random: Random) -> str:
    """Some two dozen words, so that no two are alike."""
    return prompts.document(random, 12) + " " + prompts.opening(random)


def _messages(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
