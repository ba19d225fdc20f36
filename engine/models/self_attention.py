"""Grouped-query self-attention (Ainslie et al., 2023) with rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from engine.attention.interface import AttentionStep
from engine.layers import Angles, HeadNorm
from engine.models.tensors import Tensors
from engine.parallel.group import RankGroups
from engine.parallel.shard import scaled
from engine.parallel.summed import summed


class SelfAttention:
    """The attention of layer ``index``; ``tensors`` are those of its ``self_attn``.

    A rank computes its own heads, and all ranks' outputs are summed.
    """

    def __init__(
        self, config: ModelConfig, index: int, tensors: Tensors, groups: RankGroups
    ) -> None:
        query, keys = groups.shard.query_heads(config), groups.shard.kv_heads(config)
        query_rows, key_rows = scaled(query, config.head_dim), scaled(keys, config.head_dim)
        self._index = index
        self.num_heads = query.stop - query.start
        self._num_kv_heads = keys.stop - keys.start
        self._num_rotated = self.num_heads + self._num_kv_heads  # query heads, then keys
        self._head_dim = config.head_dim
        self.rotates = index not in config.parts.unrotated_layers
        self.qkv = tensors.linear(
            "q_proj", "k_proj", "v_proj", outputs=[query_rows, key_rows, key_rows]
        )
        self.qk_norm = self._norm_of_heads(config, tensors) if config.parts.qk_norm else None
        out = tensors.linear("o_proj", inputs=query_rows, has_bias=groups.world.rank == 0)
        self.out = summed(out, groups.world)

    def __call__(self, x: Tensor, angles: Angles, attention: AttentionStep) -> Tensor:
        """[tokens, hidden] → the same; writes the tokens' KV through ``attention``."""
        qkv = self.qkv(x).view(len(x), -1, self._head_dim)
        if self.qk_norm is not None:
            self.qk_norm.normalize_(qkv[:, : self._num_rotated])
        if self.rotates:
            angles.rotate_(qkv[:, : self._num_rotated])
        query, key_value = qkv[:, : self.num_heads], qkv[:, self.num_heads :]
        key_value = key_value.view(len(x), 2, self._num_kv_heads, self._head_dim)
        attended = attention(self._index, query, key_value)
        return self.out(attended.view(len(x), -1))

    def _norm_of_heads(self, config: ModelConfig, tensors: Tensors) -> HeadNorm:
        """[heads + KV heads, head_dim] weights."""
        query = tensors["q_norm.weight"].expand(self.num_heads, -1)
        key = tensors["k_norm.weight"].expand(self._num_kv_heads, -1)
        return HeadNorm(torch.cat([query, key]), config.rms_norm_eps)
