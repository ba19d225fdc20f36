"""A mixture of experts (Shazeer et al., 2017) in place of the dense MLP.

    route ──> dispatch ──> experts ──> combine

``dispatch`` groups a step's (token, expert) pairs by expert, so that each expert that
has tokens computes one product; ``combine`` adds what comes back to the tokens. Where
experts lie on several ranks, pairs travel between dispatch and experts and back before
combine (``expert_parallel.py``); the counts say how many go where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.decoder_parts import MoeConfig
from engine.layers import Linear
from engine.models.mlp import DenseMlp
from engine.models.tensors import Tensors
from engine.parallel.shard import WHOLE


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


class SparseMlp:
    """The experts of one layer; ``tensors`` are those of its mixture-of-experts block."""

    def __init__(self, config: MoeConfig, tensors: Tensors) -> None:
        self._router = Router(config, tensors.linear("gate"))
        self._experts = Experts(config, tensors.under("experts"))

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → float32 [tokens, hidden]."""
        routing = self._router(x)
        return combine(self._experts(dispatch(x, routing), routing.counts), routing)


class Router:
    def __init__(self, config: MoeConfig, gate: Linear) -> None:
        self._num_experts = config.num_experts
        self._num_chosen = config.num_experts_per_token
        self._normalizes = config.normalizes
        self._gate = gate

    def __call__(self, x: Tensor) -> Routing:
        """Chooses by a softmax in float32 over all experts."""
        scores = self._gate.in_float32(x).softmax(dim=-1)
        weights, chosen = scores.topk(self._num_chosen, dim=-1)
        if self._normalizes:
            weights /= weights.sum(dim=-1, keepdim=True)
        chosen = chosen.view(-1)
        return Routing(
            order=chosen.argsort(stable=True),
            counts=chosen.bincount(minlength=self._num_experts).tolist(),
            weights=weights,
        )


class Experts:
    """All experts of a layer, or some; of each, all ``inner`` features or some."""

    def __init__(
        self,
        config: MoeConfig,
        tensors: Tensors,
        *,
        owned: range | None = None,
        inner: slice = WHOLE,
    ) -> None:
        self._mlps = [
            DenseMlp(
                tensors.under(str(expert)),
                gate=config.gate_name,
                up=config.up_name,
                down=config.down_name,
                inner=inner,
            )
            for expert in owned or range(config.num_experts)
        ]

    def __call__(self, pairs: Tensor, counts: list[int]) -> Tensor:
        """[pairs, hidden] grouped by expert → the same, each group by its own expert."""
        out = torch.empty_like(pairs)
        first = 0
        for mlp, count in zip(self._mlps, counts, strict=True):
            if count:
                out[first : first + count] = mlp(pairs[first : first + count])
                first += count
        return out


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """The pairs' tokens, [pairs, hidden], grouped by expert."""
    return x[routing.order // routing.weights.shape[1]]


def combine(pairs: Tensor, routing: Routing) -> Tensor:
    """Adds each token's pairs by weight, always in the same order: float32 [tokens, hidden]."""
    by_token = torch.empty(pairs.shape, dtype=torch.float32)
    by_token[routing.order] = pairs.float()
    by_token = by_token.view(*routing.weights.shape, pairs.shape[1])
    return (by_token * routing.weights[..., None]).sum(dim=1)
