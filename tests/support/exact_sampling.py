"""The distribution of a next token, computed from the definitions in docs/api.md, slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.sampling.params import SamplingParams


def edited(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], emitted: Sequence[int]
) -> list[float]:
    """After min_tokens, bias and penalties."""
    row = [float(logit) for logit in logits]
    if len(emitted) < params.min_tokens:
        for token in params.stop_token_ids:
            row[token] = -math.inf
    for token, bias in params.logit_bias:
        row[token] += bias
    for token in {*prompt, *emitted}:
        penalty = params.repetition_penalty
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in emitted:
        row[token] -= params.frequency_penalty
    for token in set(emitted):
        row[token] -= params.presence_penalty
    return row


def greedy(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], emitted: Sequence[int]
) -> int:
    row = edited(logits, params, prompt, emitted)
    return row.index(max(row))


def distribution(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], emitted: Sequence[int]
) -> list[float]:
    """Probabilities by token, at a temperature above 0."""
    row = edited(logits, params, prompt, emitted)
    weights = [math.exp((logit - max(row)) / params.temperature) for logit in row]
    kept = [token for token, weight in enumerate(weights) if weight >= params.min_p]
    kept.sort(key=lambda token: (-weights[token], token))
    kept = kept[: params.top_k or len(kept)]
    total, reached, inside = sum(weights[token] for token in kept), 0.0, set()
    for token in kept:
        if not inside or params.top_p == 1 or reached < params.top_p * total:
            inside.add(token)
        reached += weights[token]
    total = sum(weights[token] for token in inside)
    return [weight / total if token in inside else 0.0 for token, weight in enumerate(weights)]
