"""The values that pass between the HTTP edge and the orchestrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.logprobs import TokenLogprobs
from baton.records import Role, context_needed
from baton.timeline import Timeline
from baton.v1 import session_pb2 as pb

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn; temperature 0 is greedy, top_p 1 and top_k 0 are off, and so
    are the defaults."""

    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    min_tokens: int = 0
    """No stop token id and no stop string ends the choice before so many."""
    num_logprobs: int | None = None
    """How many of the likeliest tokens come with each token; None: no log-probabilities."""

    def to_proto(self) -> pb.Sampling:
        return pb.Sampling(
            seed=self.seed,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=dict(self.logit_bias),
            min_tokens=self.min_tokens,
            num_logprobs=self.num_logprobs,
        )


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
    priority: int = 0
    """Wherever choices wait, the lower one goes first."""
    timeline: Timeline | None = None
    """Where the choice's times are noted, if somebody wants to read them."""

    def context_needed(self, role: Role, *, num_emitted_tokens: int) -> int:
        """Tokens that a worker of that role must be able to hold to take it on."""
        return context_needed(
            role,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_emitted_tokens=num_emitted_tokens,
            max_tokens=self.max_tokens,
        )


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
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of ``token_ids``, where the choice wants them."""
