"""Frequencies of the rotary embedding, as they are or scaled to longer contexts.

The scalings follow transformers' ``modeling_rope_utils``, of which the tests make an oracle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baton.checkpoint.rope_config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position, float32 [head_dim / 2], and what cosines and sines are scaled by."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_scale(rope)
    if rope.kind == "factors":
        return plain / torch.tensor(rope.factors), rope.attention_factor or 1.0
    return plain, 1.0


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long waves are stretched by ``factor``, short ones kept, a ramp between."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * plain / rope.factor + ramp * plain


def _yarn(rope: RopeConfig, plain: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023): a ramp over the dimensions rather than the waves' lengths."""
    head_dim = 2 * len(plain)

    def dimension(num_turns: float) -> float:
        """The dimension whose wave turns that often within the original length."""
        wave = rope.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(len(plain), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return rope.magnitude(rope.mscale) / rope.magnitude(rope.mscale_all_dim)
    return rope.magnitude(1.0)
