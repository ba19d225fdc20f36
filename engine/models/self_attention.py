"""Grouped-query self-attention (Ainslie et al., 2023) with rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from engine.attention.interface import AttentionStep
from engine.layers import RMSNorm, Rotary
from engine.models.tensors import Tensors

Angles = tuple[Tensor, Tensor]


class SelfAttention:
    """The attention of layer ``index``; ``tensors`` are those of its ``self_attn``."""

    def __init__(self, config: ModelConfig, index: int, tensors: Tensors) -> None:
        self._index = index
        self._num_rotated = config.num_heads + config.num_kv_heads  # query heads, then keys
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._rotates = index not in config.parts.unrotated_layers
        self._qkv = tensors.linear("q_proj", "k_proj", "v_proj")
        self._qk_norm = _qk_norm(config, tensors) if config.parts.qk_norm else None
        self._out = tensors.linear("o_proj")

    def __call__(self, x: Tensor, angles: Angles, attention: AttentionStep) -> Tensor:
        """[tokens, hidden] → the same; writes the tokens' KV through ``attention``."""
        qkv = self._qkv(x).view(len(x), -1, self._head_dim)
        if self._qk_norm is not None:
            heads = qkv[:, : self._num_rotated]
            heads.copy_(self._qk_norm(heads.float()))
        if self._rotates:
            Rotary.rotate_(qkv[:, : self._num_rotated], angles)
        query, key_value = qkv[:, : self._num_heads], qkv[:, self._num_heads :]
        key_value = key_value.view(len(x), 2, self._num_kv_heads, self._head_dim)
        attended = attention(self._index, query, key_value)
        return self._out(attended.view(len(x), -1))


def _qk_norm(config: ModelConfig, tensors: Tensors) -> RMSNorm:
    """One norm over each head by itself: [heads + KV heads, head_dim] weights."""
    query = tensors["q_norm.weight"].expand(config.num_heads, -1)
    key = tensors["k_norm.weight"].expand(config.num_kv_heads, -1)
    return RMSNorm(torch.cat([query, key]), config.rms_norm_eps)
