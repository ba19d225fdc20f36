"""Chooses the experts of every token: what a mixture of experts begins with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.decoder_parts import MoeConfig
from engine.models.tensors import Tensors


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a step's tokens go to.

    A pair is one of the top k experts of one token; ``order`` (int64 [tokens × k]) lists
    the pairs by expert, each as token × k + rank. ``counts`` has each expert's number of
    pairs. ``weights`` is float32 [tokens, k].
    """

    order: Tensor
    counts: list[int]
    weights: Tensor


class Router:
    """The router of one layer; ``tensors`` are those of its mixture-of-experts block."""

    def __init__(self, config: MoeConfig, tensors: Tensors) -> None:
        self._config = config
        self._gate = tensors.router("gate")
        self._bias = tensors["gate.e_score_correction_bias"] if config.has_choice_bias else None
        self._is_limited = config.num_chosen_groups < config.num_groups

    def __call__(self, x: Tensor) -> Routing:
        """Scores all experts, in float32, and chooses."""
        config = self._config
        weights, chosen = self._choose(self._scores(x))
        if config.normalizes:
            total = weights.sum(dim=-1, keepdim=True)
            # Sigmoids, unlike a softmax, may all be 0.
            weights /= total + 1e-20 if config.scoring == "sigmoid" else total
        if config.weights_scale != 1.0:
            weights *= config.weights_scale
        chosen = chosen.view(-1)
        return Routing(
            order=chosen.argsort(stable=True),
            counts=chosen.bincount(minlength=config.num_experts).tolist(),
            weights=weights,
        )

    def _scores(self, x: Tensor) -> Tensor:
        outputs = self._gate.in_float32(x)
        return outputs.sigmoid() if self._config.scoring == "sigmoid" else outputs.softmax(dim=-1)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best experts' scores and numbers, [tokens, k] each."""
        num_chosen = self._config.num_experts_per_token
        if self._bias is None and not self._is_limited:
            weights, chosen = scores.topk(num_chosen, dim=-1)
            return weights, chosen
        ranked = scores if self._bias is None else scores + self._bias
        if self._is_limited:
            ranked = self._in_best_groups(ranked)
        chosen = ranked.topk(num_chosen, dim=-1).indices
        return scores.gather(1, chosen), chosen

    def _in_best_groups(self, ranked: Tensor) -> Tensor:
        """Without the experts of other groups (DeepSeek-V2, 2024, section 2.2.2: a token's
        experts then lie on few devices)."""
        config = self._config
        size = config.num_experts // config.num_groups
        by_group = ranked.view(len(ranked), config.num_groups, size)
        sums = by_group.topk(config.num_summed, dim=-1).values.sum(dim=-1)
        best = sums.topk(config.num_chosen_groups, dim=-1).indices
        is_other = torch.ones_like(sums, dtype=torch.bool).scatter_(1, best, False)
        return by_group.masked_fill(is_other[..., None], -math.inf).view(ranked.shape)
