"""A mixture of experts (Shazeer et al., 2017) in place of the dense MLP.

    route ──> dispatch ──> experts ──> combine

``dispatch`` groups a step's (token, expert) pairs by expert, so that each expert that
has tokens computes one product; ``combine`` adds what comes back to the tokens. Where
experts lie on several ranks, pairs travel between dispatch and experts and back before
combine (``expert_parallel.py``); the counts say how many go where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.checkpoint.decoder_parts import MoeConfig
from engine.models.mlp import DenseMlp
from engine.models.router import Router, Routing
from engine.models.tensors import Tensors
from engine.parallel.shard import WHOLE


class SparseMlp:
    """The experts of one layer; ``tensors`` are those of its mixture-of-experts block."""

    def __init__(self, config: MoeConfig, tensors: Tensors) -> None:
        self._router = Router(config, tensors)
        self._experts = Experts(config, tensors.under("experts"))
        self._shared = shared_experts(config, tensors)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → float32 [tokens, hidden]."""
        routing = self._router(x)
        out = combine(self._experts(dispatch(x, routing), routing.counts), routing)
        return out if self._shared is None else out.add_(self._shared(x))


def shared_experts(config: MoeConfig, tensors: Tensors, *, inner: slice = WHOLE) -> DenseMlp | None:
    """The MLP that every token goes through beside its experts, if there is one; of all its
    features, or of ``inner`` a summand."""
    if not config.shared_intermediate_size:
        return None
    return DenseMlp(tensors.under("shared_experts"), inner=inner)


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
