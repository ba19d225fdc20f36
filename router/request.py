"""The values that pass between the HTTP edge and the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.timeline import Timeline

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; temperature 0 is greedy, top_p 1 and top_k 0 are off."""

    seed: int
    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """One choice of one request: what the orchestrator takes to its end."""

    request_id: str
    choice_index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    """End-of-sequence ids included, unless the client ignores them."""
    deadline: float
    """On the event loop's clock, seconds."""
    traceparent: str = ""
    tracestate: str = ""
    cache_salt: str = ""
    timeline: Timeline | None = None
    """Where the choice's times are noted, if somebody wants to read them."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that came from a worker in one message."""

    at: float
    """When the gateway received it, by ``time.perf_counter``: whoever reads them may be late."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What arrived of a choice since the last one. The last has a finish reason."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Of the prompt, what no worker had to compute; valid from the last output on."""
    arrivals: tuple[Arrival, ...] = ()
    """Of ``token_ids``, in order."""
