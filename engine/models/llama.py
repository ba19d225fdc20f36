"""The Llama family: a decoder with RMSNorm, rotary embedding, grouped-query attention
and SwiGLU (Touvron et al., 2023), over one packed step of tokens of many sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from engine.attention.interface import AttentionStep
from engine.layers import Linear, RMSNorm, Rotary, swiglu


class _Weights:
    """The tensors under one prefix of Hugging Face names."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[f"{self._prefix}.{name}"]

    def linear(self, *names: str) -> Linear:
        """One layer that computes the outputs of several, side by side."""
        weights = [self[f"{name}.weight"] for name in names]
        biases = [self._tensors.get(f"{self._prefix}.{name}.bias") for name in names]
        present = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(biases)), f"{self._prefix}: some biases are missing"
        return Linear(torch.cat(weights), torch.cat(present) if present else None)


class _Layer:
    def __init__(self, config: ModelConfig, weights: _Weights) -> None:
        eps = config.rms_norm_eps
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._input_norm = RMSNorm(weights["input_layernorm.weight"], eps)
        self._qkv = weights.linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._out = weights.linear("self_attn.o_proj")
        self._mlp_norm = RMSNorm(weights["post_attention_layernorm.weight"], eps)
        self._gate_up = weights.linear("mlp.gate_proj", "mlp.up_proj")
        self._down = weights.linear("mlp.down_proj")

    def add_to(
        self, x: Tensor, index: int, angles: tuple[Tensor, Tensor], attention: AttentionStep
    ) -> None:
        """Adds this layer's part to the residual stream ``x``, float32 [tokens, hidden]."""
        qkv = self._qkv(self._input_norm(x)).view(len(x), -1, self._head_dim)
        Rotary.rotate_(qkv[:, : self._num_heads + self._num_kv_heads], angles)
        query, key_value = qkv[:, : self._num_heads], qkv[:, self._num_heads :]
        key_value = key_value.view(len(x), 2, self._num_kv_heads, self._head_dim)
        attended = attention(index, query, key_value)
        x += self._out(attended.view(len(x), -1))
        x += self._down(swiglu(self._gate_up(self._mlp_norm(x))))


class LlamaModel:
    """One model's weights, ready to run. ``weights`` go by their Hugging Face names,
    all of one dtype; those that a Linear lays out anew are not kept."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.vocab_size = config.vocab_size
        self._embedding = weights["model.embed_tokens.weight"]
        self._layers = [
            _Layer(config, _Weights(weights, f"model.layers.{index}"))
            for index in range(config.num_layers)
        ]
        self._norm = RMSNorm(weights["model.norm.weight"], config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self._head = Linear(self._embedding if tied else weights["lm_head.weight"])
        self._rotary = Rotary(config.head_dim, config.rope_theta, self._embedding.dtype)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sampled_rows: Tensor,
        attention: AttentionStep,
    ) -> Tensor:
        """Computes a packed step of ``token_ids`` at ``positions``, int64 [tokens] each.

        Writes every token's KV through ``attention``. Returns the logits, float32
        [len(sampled_rows), vocabulary], of the rows that are asked for.
        """
        # The residual stream is float32 whatever the weights are: kept in bfloat16, its
        # 2 × layers additions would make the logits' error 1.6 times as large.
        x = F.embedding(token_ids, self._embedding).float()
        angles = self._rotary.angles(positions)
        for index, layer in enumerate(self._layers):
            layer.add_to(x, index, angles, attention)
        if len(sampled_rows) == 0:
            return torch.empty(0, self.vocab_size)
        return self._head.in_float32(self._norm(x[sampled_rows]))
