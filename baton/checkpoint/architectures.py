"""The architectures that are built: one entry each, read by router and engine alike.

An entry says in what an architecture differs from Llama, and by what names a
``config.json`` and a GGUF file say so. docs/models.md walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.checkpoint.config_fields import ConfigFields
from baton.checkpoint.decoder_parts import (
    DecoderParts,
    MoeConfig,
    named_window,
    qwen_window,
    qwen_windows,
    same_window,
)
from baton.checkpoint.deepseek import deepseek_v2, deepseek_v3


@dataclass(frozen=True, slots=True)
class GgufNames:
    """How llama.cpp stores an architecture.

    ``fields`` maps its own metadata (without the architecture's prefix) to config.json;
    ``constants`` are the fields of config.json that llama.cpp takes for granted.
    ``turns_neighbours`` says that its rotary embedding turns the pairs (2i, 2i+1) of a
    head, so that query and key rows are stored in another order.
    """

    architecture: str
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    turns_neighbours: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One entry. ``parts`` reads what differs from Llama out of config.json.

    ``required`` are fields that may be absent for Llama, but for which transformers has
    a default of its own here; the last three are such defaults.
    """

    model_type: str
    parts: Callable[[ConfigFields], DecoderParts]
    gguf: GgufNames | None = None
    required: tuple[str, ...] = ()
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False


def _llama(fields: ConfigFields) -> DecoderParts:
    bias = fields.flag("attention_bias")
    return DecoderParts(
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        windows=same_window(fields, None),
    )


def _mistral(fields: ConfigFields) -> DecoderParts:
    return DecoderParts(windows=same_window(fields, named_window(fields, 4096)))


def _qwen2(fields: ConfigFields) -> DecoderParts:
    return DecoderParts(qkv_bias=True, windows=qwen_windows(fields))


def _qwen3(fields: ConfigFields) -> DecoderParts:
    bias = fields.flag("attention_bias")
    return DecoderParts(qkv_bias=bias, out_bias=bias, qk_norm=True, windows=qwen_windows(fields))


def _mixtral(fields: ConfigFields) -> DecoderParts:
    moe = MoeConfig(
        num_experts=fields.count("num_local_experts", 8),
        num_experts_per_token=fields.count("num_experts_per_tok", 2),
        intermediate_size=fields.count("intermediate_size"),
        normalizes=True,
        block_name="block_sparse_moe",
        gate_name="w1",
        up_name="w3",
        down_name="w2",
    )
    return DecoderParts(windows=same_window(fields, named_window(fields, None)), moe=moe)


def _qwen3_moe(fields: ConfigFields) -> DecoderParts:
    bias = fields.flag("attention_bias")
    step = fields.count("decoder_sparse_step", 1)
    dense = set(fields.items("mlp_only_layers", int) or ())
    dense |= {layer for layer in range(fields.count("num_hidden_layers")) if (layer + 1) % step}
    moe = MoeConfig(
        # transformers 5 writes the second, checkpoints of before it have the first.
        num_experts=fields.count("num_experts", fields.get("num_local_experts")),
        num_experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        normalizes=fields.flag("norm_topk_prob"),
        dense_layers=frozenset(dense),
    )
    windows = same_window(fields, qwen_window(fields))
    return DecoderParts(qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows, moe=moe)


def _smollm3(fields: ConfigFields) -> DecoderParts:
    num_layers = fields.count("num_hidden_layers")
    rotated = fields.items("no_rope_layers", int)  # 1 where there is a rotary embedding
    if rotated is None:
        interval = fields.count("no_rope_layer_interval", 4)
        rotated = tuple((layer + 1) % interval for layer in range(num_layers))
    if len(rotated) < num_layers:
        fields.fail(f"no_rope_layers has {len(rotated)} entries; expected {num_layers}")
    if fields.flag("use_sliding_window"):
        fields.fail("use_sliding_window is not supported for this architecture")
    bias = fields.flag("attention_bias")
    return DecoderParts(
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        windows=same_window(fields, None),
        unrotated_layers=frozenset(layer for layer in range(num_layers) if not rotated[layer]),
    )


_EXPERT_FIELDS = {"expert_used_count": "num_experts_per_tok"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama",
        _llama,
        gguf=GgufNames("llama", turns_neighbours=True),
    ),
    "MistralForCausalLM": Architecture("mistral", _mistral, required=("num_key_value_heads",)),
    "Qwen2ForCausalLM": Architecture("qwen2", _qwen2, gguf=GgufNames("qwen2")),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        _qwen3,
        gguf=GgufNames("qwen3"),
        required=("head_dim", "num_key_value_heads"),
    ),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        _mixtral,
        gguf=GgufNames(
            "llama",
            fields={**_EXPERT_FIELDS, "expert_count": "num_local_experts"},
            turns_neighbours=True,
        ),
        required=("num_key_value_heads",),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        _qwen3_moe,
        gguf=GgufNames(
            "qwen3moe",
            fields={
                **_EXPERT_FIELDS,
                "expert_count": "num_experts",
                "expert_feed_forward_length": "moe_intermediate_size",
            },
            constants={"norm_topk_prob": True},
        ),
        required=("num_key_value_heads",),
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        _smollm3,
        required=("num_key_value_heads",),
        rope_theta=2e6,
        tie_word_embeddings=True,
    ),
    "DeepseekV2ForCausalLM": Architecture("deepseek_v2", deepseek_v2),
    "DeepseekV3ForCausalLM": Architecture("deepseek_v3", deepseek_v3, required=("norm_topk_prob",)),
}
