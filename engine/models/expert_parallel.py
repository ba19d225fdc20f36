"""A mixture of experts on several ranks (GShard, Lepikhin et al., 2020).

    a step's tokens, on every rank
          │ each expert group takes its share of them
        route ──> dispatch ── all-to-all ──> experts ── all-to-all ──> combine
          │                                                               │
    a step's tokens, on every rank <────────── all-reduce ────────────────┘

The ranks of one group hold parts of the same experts' features. They route the same
tokens alike, and what they compute of them is summed by the same all-reduce that gives
every rank the other groups' tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.checkpoint.decoder_parts import MoeConfig
from engine.models.moe import Experts, combine, dispatch, shared_experts
from engine.models.router import Router, Routing
from engine.models.tensors import Tensors
from engine.parallel.group import RankGroups


class SplitSparseMlp:
    """One rank's part of ``SparseMlp``."""

    def __init__(self, config: MoeConfig, tensors: Tensors, groups: RankGroups) -> None:
        shard = groups.shard
        self._groups = groups
        self._router = Router(config, tensors)
        self._experts = Experts(
            config,
            tensors.under("experts"),
            owned=shard.experts(config.num_experts),
            inner=shard.expert_inner(config.intermediate_size),
        )
        # A dense MLP like others: over all ranks, and the same sum adds it up.
        inner = shard.inner(config.shared_intermediate_size)
        self._shared = shared_experts(config, tensors, inner=inner)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → float32 [tokens, hidden]."""
        own = self._groups.shard.rows(len(x))
        out = torch.zeros(x.shape, dtype=torch.float32)
        routing = self._router(x[own])
        out[own] = combine(self._compute(dispatch(x[own], routing), routing), routing)
        if self._shared is not None:
            out += self._shared(x)
        return self._groups.world.all_reduce_(out)

    def _compute(self, pairs: Tensor, routing: Routing) -> Tensor:
        """Each pair by its own expert, wherever that is."""
        ranks = self._groups.experts
        if ranks.size == 1:
            return self._experts(pairs, routing.counts)
        counts = torch.tensor(routing.counts).view(ranks.size, -1)
        each = [1] * ranks.size
        arrived_counts = ranks.all_to_all(counts, each, each)  # [from rank, own expert]
        sent, received = counts.sum(dim=1).tolist(), arrived_counts.sum(dim=1).tolist()
        arrived = ranks.all_to_all(pairs, sent, received)
        # They lie by rank, each rank's by expert; the experts want them by expert alone.
        experts = torch.arange(counts.shape[1]).repeat(ranks.size)
        order = experts.repeat_interleave(arrived_counts.view(-1)).argsort(stable=True)
        computed = torch.empty_like(arrived)
        computed[order] = self._experts(arrived[order], arrived_counts.sum(dim=0).tolist())
        return ranks.all_to_all(computed, received, sent)
