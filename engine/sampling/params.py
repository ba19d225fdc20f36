"""How one choice's tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The defaults are those that change nothing; ``temperature`` 0 is greedy."""

    seed: int
    choice_index: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Not drawn before ``min_tokens`` are emitted."""
    num_logprobs: int | None = None
    """How many of the likeliest tokens are told with each token; None tells nothing."""
