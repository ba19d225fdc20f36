"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1), computed on the latent vectors.

    x ──> query of each head: plain │ rotary          x ──> latent vector │ rotary key
             │ times its key matrix                          (both cached, once for all heads)
          latent query │ rotary query   ── attention ──>  sum of latent vectors
                                                             │ times its value matrix
                                                          output of each head

A head's key is its key matrix times the latent vector, so its product with a query is that
of the latent vector with the query times that matrix; a sum of values is the value matrix
times a sum of latent vectors. With the matrices on the side of the query (the paper's
"absorbed" form) all heads read one cached key, and nothing is made of a context but its
scores: a decode step touches no more than what is cached. The other way, making every
head's keys and values of the whole context in each layer and step, has
kv_rank × (plain_dim + value_dim) products a head and cached token more, and
2 × kv_rank − plain_dim − value_dim fewer for each query that shares them. At DeepSeek's
sizes that has fewer products for chunks of more than about 170 tokens. There is one form
all the same: prefill and decode then round alike (docs/adr/0013-latent-attention.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from engine.attention.interface import AttentionStep
from engine.layers import Angles, Layer
from engine.models.tensors import Tensors
from engine.parallel.group import RankGroups
from engine.parallel.shard import scaled
from engine.parallel.summed import summed

_EPS = 1e-6
"""Of the norms over latent vectors, whatever ``rms_norm_eps`` is: so do all who publish them."""


class LatentAttention:
    """The attention of layer ``index``; ``tensors`` are those of its ``self_attn``.

    A rank computes its own heads, and all ranks' outputs are summed. Every rank computes the
    latent vectors, and writes the same bytes of them to the same place.
    """

    def __init__(
        self, config: ModelConfig, index: int, tensors: Tensors, groups: RankGroups
    ) -> None:
        latent = config.parts.latent
        assert latent is not None
        own = groups.shard.query_heads(config)
        self._index = index
        self._latent = latent
        self._num_heads = own.stop - own.start
        query_rows = [scaled(own, latent.query_dim)]
        self._query: Layer
        if latent.query_rank is None:
            self._query_norm = None
            self._query = tensors.linear("q_proj", outputs=query_rows)
            self._down = tensors.linear("kv_a_proj_with_mqa")
        else:
            self._query_norm = tensors.norm("q_a_layernorm", _EPS)
            self._query = tensors.linear("q_b_proj", outputs=query_rows)
            self._down = tensors.linear("q_a_proj", "kv_a_proj_with_mqa")
        self._kv_norm = tensors.norm("kv_a_layernorm", _EPS)
        by_head = tensors.by_head("kv_b_proj", own, latent.plain_dim + latent.value_dim)
        self._keys = by_head[:, : latent.plain_dim]  # [heads, plain_dim, kv_rank]
        self._values = by_head[:, latent.plain_dim :].transpose(1, 2)
        out = tensors.linear(
            "o_proj", inputs=scaled(own, latent.value_dim), has_bias=groups.world.rank == 0
        )
        self._out = summed(out, groups.world)

    def __call__(self, x: Tensor, angles: Angles, attention: AttentionStep) -> Tensor:
        """[tokens, hidden] → the same; writes the tokens' latent vectors and rotated keys
        through ``attention``."""
        num_heads, rank = self._num_heads, self._latent.kv_rank
        down = self._down(x)
        cached = down[:, -self._latent.cached_dim :]
        query = x if self._query_norm is None else self._query_norm(self._query_latent(down))
        heads = self._query(query).view(len(x), num_heads, -1)
        plain, rotary = heads[..., : self._latent.plain_dim], heads[..., self._latent.plain_dim :]
        # The query heads, then the one key.
        rows = torch.empty(len(x), num_heads + 1, self._latent.cached_dim, dtype=x.dtype)
        rows[:, :num_heads, :rank] = torch.bmm(plain.transpose(0, 1), self._keys).transpose(0, 1)
        rows[:, num_heads, :rank] = self._kv_norm(cached[:, :rank].float())
        rows[:, :num_heads, rank:] = self._halves(rotary)
        rows[:, num_heads, rank:] = self._halves(cached[:, rank:])
        angles.rotate_(rows[..., rank:])
        attended = attention(self._index, rows[:, :num_heads], rows[:, None, num_heads:])
        values = torch.bmm(attended.transpose(0, 1), self._values)
        return self._out(values.transpose(0, 1).reshape(len(x), -1))

    def _query_latent(self, down: Tensor) -> Tensor:
        return down[:, : self._latent.query_rank].float()

    def _halves(self, rotary: Tensor) -> Tensor:
        """With the elements that are turned together half of ``rotary_dim`` apart. Queries
        and keys are put in order alike, so that their products stay as they are."""
        if not self._latent.turns_neighbours:
            return rotary
        neighbours = rotary.view(*rotary.shape[:-1], -1, 2)
        return neighbours.transpose(-1, -2).reshape(rotary.shape)
