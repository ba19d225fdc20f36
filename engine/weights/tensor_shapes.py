"""Which tensors a model of the Llama family has: their Hugging Face names and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_NUM_NAMED = 5


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model; without ``lm_head.weight`` where it is the embedding."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= _layer_shapes(config, f"model.layers.{layer}")
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ModelConfig, prefix: str) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {f"{prefix}.input_layernorm.weight": (hidden,)}
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for name, shape in attention.items():
        shapes[f"{prefix}.self_attn.{name}.weight"] = shape
        if config.attention_bias:
            shapes[f"{prefix}.self_attn.{name}.bias"] = shape[:1]
    shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    for name, shape in mlp.items():
        shapes[f"{prefix}.mlp.{name}.weight"] = shape
        if config.mlp_bias:
            shapes[f"{prefix}.mlp.{name}.bias"] = shape[:1]
    return shapes


def is_ignored(name: str) -> bool:
    """True for buffers of older checkpoints that are computed from the config anyway."""
    return name.endswith("rotary_emb.inv_freq")


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
