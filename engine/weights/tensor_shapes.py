"""Which tensors a model has: their Hugging Face names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from baton.checkpoint.decoder_parts import LatentConfig, MoeConfig
from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_CHOICE_BIAS = "e_score_correction_bias"

_NUM_NAMED = 5


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model; without ``lm_head.weight`` where it is the embedding."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= _layer_shapes(config, layer)
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig, index: int) -> dict[str, Shape]:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    shapes: dict[str, Shape] = {f"{prefix}.input_layernorm.weight": (hidden,)}
    if config.parts.latent is None:
        shapes |= _attention_shapes(config, f"{prefix}.self_attn")
    else:
        shapes |= _latent_shapes(config, config.parts.latent, f"{prefix}.self_attn")
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    moe = config.parts.moe
    if moe is not None and config.parts.is_sparse(index):
        return shapes | _moe_shapes(moe, hidden, f"{prefix}.{moe.block_name}")
    inner = config.intermediate_size
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for name, shape in mlp.items():
        shapes |= _linear(f"{prefix}.mlp.{name}", shape, config.parts.mlp_bias)
    return shapes


def _attention_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden, parts = config.hidden_size, config.parts
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes = {
        **_linear(f"{prefix}.q_proj", (queries, hidden), parts.qkv_bias),
        **_linear(f"{prefix}.k_proj", (keys, hidden), parts.qkv_bias),
        **_linear(f"{prefix}.v_proj", (keys, hidden), parts.qkv_bias),
        **_linear(f"{prefix}.o_proj", (hidden, queries), parts.out_bias),
    }
    if parts.qk_norm:
        shapes[f"{prefix}.q_norm.weight"] = (config.head_dim,)
        shapes[f"{prefix}.k_norm.weight"] = (config.head_dim,)
    return shapes


def _latent_shapes(config: ModelConfig, latent: LatentConfig, prefix: str) -> dict[str, Shape]:
    hidden, num_heads, rank = config.hidden_size, config.num_heads, latent.query_rank
    made = num_heads * (latent.plain_dim + latent.value_dim)
    values, has_bias = num_heads * latent.value_dim, config.parts.qkv_bias
    queries = (num_heads * latent.query_dim, rank or hidden)
    shapes = {
        f"{prefix}.{'q_b_proj' if rank else 'q_proj'}.weight": queries,
        **_linear(f"{prefix}.kv_a_proj_with_mqa", (latent.cached_dim, hidden), has_bias),
        f"{prefix}.kv_a_layernorm.weight": (latent.kv_rank,),
        f"{prefix}.kv_b_proj.weight": (made, latent.kv_rank),
        **_linear(f"{prefix}.o_proj", (hidden, values), config.parts.out_bias),
    }
    if rank is not None:
        shapes |= _linear(f"{prefix}.q_a_proj", (rank, hidden), has_bias)
        shapes[f"{prefix}.q_a_layernorm.weight"] = (rank,)
    return shapes


def _moe_shapes(moe: MoeConfig, hidden: int, prefix: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (moe.num_experts, hidden)}
    if moe.has_choice_bias:
        shapes[f"{prefix}.gate.{_CHOICE_BIAS}"] = (moe.num_experts,)
    if shared := moe.shared_intermediate_size:
        shapes[f"{prefix}.shared_experts.gate_proj.weight"] = (shared, hidden)
        shapes[f"{prefix}.shared_experts.up_proj.weight"] = (shared, hidden)
        shapes[f"{prefix}.shared_experts.down_proj.weight"] = (hidden, shared)
    inner = moe.intermediate_size
    for expert in range(moe.num_experts):
        name = f"{prefix}.experts.{expert}"
        shapes[f"{name}.{moe.gate_name}.weight"] = (inner, hidden)
        shapes[f"{name}.{moe.up_name}.weight"] = (inner, hidden)
        shapes[f"{name}.{moe.down_name}.weight"] = (hidden, inner)
    return shapes


def _linear(name: str, shape: Shape, has_bias: bool) -> dict[str, Shape]:
    shapes = {f"{name}.weight": shape}
    return {**shapes, f"{name}.bias": shape[:1]} if has_bias else shapes


def is_ignored(name: str, config: ModelConfig) -> bool:
    """True for buffers of older checkpoints that are computed from the config anyway, and
    for the layers behind the model's own that predict more than one token."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    num_layers = config.num_layers
    draft_layers = range(num_layers, num_layers + config.parts.num_draft_layers)
    return name.startswith(tuple(f"model.layers.{layer}." for layer in draft_layers))


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """A tensor's in a model of ``dtype``. Some keep float32 whatever that is: biases that are
    large beside the differences they decide on."""
    return torch.float32 if name.endswith(f".{_CHOICE_BIAS}") else dtype


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError naming tensors that are missing, surplus or misshapen."""
    faults = []
    if missing := [f"{name} {list(expected[name])}" for name in expected if name not in found]:
        faults.append(f"missing {_some(missing)}")
    if surplus := [f"{name} {list(found[name])}" for name in found if name not in expected]:
        faults.append(f"surplus {_some(surplus)}")
    if misshapen := [
        f"{name} is {list(shape)}, expected {list(expected[name])}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]:
        faults.append(f"misshapen {_some(misshapen)}")
    if faults:
        raise CheckpointError(f"{where}: its tensors do not fit its config: {'; '.join(faults)}")


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _NUM_NAMED} more" if len(items) > _NUM_NAMED else ""
    return ", ".join(items[:_NUM_NAMED]) + more
