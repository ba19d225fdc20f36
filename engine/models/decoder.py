"""A decoder of the Llama kind: RMSNorm, rotary embedding, grouped-query or latent attention and
SwiGLU (Touvron et al., 2023), over one packed step of tokens of many sequences.

What architectures differ in is in ``ModelConfig.parts``; each part is a file beside this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from baton.checkpoint.model_config import ModelConfig
from engine.attention.interface import AttentionStep
from engine.layers import Angles, RMSNorm, Rotary
from engine.logits import Logits
from engine.models.at_once import native_layers
from engine.models.expert_parallel import SplitSparseMlp
from engine.models.latent_attention import LatentAttention
from engine.models.mlp import DenseMlp, Mlp
from engine.models.moe import SparseMlp
from engine.models.rope import rope_frequencies
from engine.models.self_attention import SelfAttention
from engine.models.tensors import Tensors
from engine.models.vocabulary import embedding_of, head_of
from engine.parallel.group import RankGroups
from engine.parallel.summed import summed
from engine.quantized import Quantization


class _Layer:
    def __init__(
        self, config: ModelConfig, index: int, tensors: Tensors, groups: RankGroups
    ) -> None:
        eps = config.rms_norm_eps
        self.attention_norm = tensors.norm("input_layernorm", eps)
        self.attention = _attention(config, index, tensors.under("self_attn"), groups)
        self.mlp_norm = tensors.norm("post_attention_layernorm", eps)
        self.mlp = _mlp(config, index, tensors, groups)

    def __call__(
        self, x: Tensor, delta: Tensor | None, angles: Angles, attention: AttentionStep
    ) -> Tensor:
        """Adds ``delta`` and the attention's part to the residual stream ``x``, float32
        [tokens, hidden]. Returns the MLP's, which the next layer adds with its norm."""
        delta = self.attention(self.attention_norm(x, delta), angles, attention)
        return self.mlp(self.mlp_norm(x, delta))


def _attention(
    config: ModelConfig, index: int, tensors: Tensors, groups: RankGroups
) -> SelfAttention | LatentAttention:
    if config.parts.latent is None:
        return SelfAttention(config, index, tensors, groups)
    return LatentAttention(config, index, tensors, groups)


def _mlp(config: ModelConfig, index: int, tensors: Tensors, groups: RankGroups) -> Mlp:
    moe, world = config.parts.moe, groups.world
    if moe is not None and config.parts.is_sparse(index):
        block = tensors.under(moe.block_name)
        return SparseMlp(moe, block) if world.size == 1 else SplitSparseMlp(moe, block, groups)
    inner = groups.shard.inner(config.intermediate_size)
    return summed(DenseMlp(tensors.under("mlp"), inner=inner, has_bias=world.rank == 0), world)


class Decoder:
    """One model's weights, ready to run. ``weights`` go by their Hugging Face names, of one
    dtype but for those that are always float32; those that are laid out anew are not kept.
    With ``quantization``, linear layers other than routers and the head keep theirs in fewer bits.

    One of several ranks keeps its part of them. All ranks compute every step together.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        groups: RankGroups | None = None,
        quantization: Quantization = "none",
    ) -> None:
        groups = groups or RankGroups()
        embedding = weights["model.embed_tokens.weight"]
        tied = config.tie_word_embeddings
        self.vocab_size = config.vocab_size
        self._embed = embedding_of(embedding, groups)
        self._layers = [
            _Layer(config, index, Tensors(weights, f"model.layers.{index}", quantization), groups)
            for index in range(config.num_layers)
        ]
        self._at_once = native_layers(config, self._layers)
        self._norm = RMSNorm(weights["model.norm.weight"], config.rms_norm_eps)
        self._logits = head_of(embedding if tied else weights["lm_head.weight"], groups)
        frequencies, scale = rope_frequencies(config.rope, config.rotary_dim)
        self._rotary = Rotary(frequencies.to(embedding.device), embedding.dtype, scale)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sampled_rows: Tensor,
        attention: AttentionStep,
    ) -> Logits:
        """Computes a packed step of ``token_ids`` at ``positions``, int64 [tokens] each.

        Writes every token's KV through ``attention``. Returns the logits of the rows that are
        asked for; where there are several ranks the first alone gets them, the others none. The
        next step overwrites them.
        """
        # The residual stream is float32 whatever the weights are: kept in bfloat16, its
        # 2 × layers additions would make the logits' error 1.6 times as large.
        x = self._embed(token_ids).float()
        angles = self._rotary.angles(positions)
        delta: Tensor | None = None
        spans = attention.paged_spans() if self._at_once is not None else None
        if self._at_once is not None and spans is not None:
            delta = self._at_once(x, angles.cos, angles.sin, spans)
        else:
            for layer in self._layers:
                delta = layer(x, delta, angles, attention)
        if len(sampled_rows) == 0:
            return Logits(torch.empty(0, self.vocab_size, device=x.device))
        assert delta is not None, "a model without layers"
        return self._logits(self._norm(x[sampled_rows], delta[sampled_rows]))
