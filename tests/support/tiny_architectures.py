"""Tiny random models of every architecture: transformers makes the checkpoint and is the oracle.

Their limits are small and lie apart from each other: blocks of 16 tokens, windows of 20,
a rotary embedding scaled from 32 on.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import vocabulary, write_json, write_tokenizer

WINDOW = 20
ORIGINAL = 32
_SIZES = {
    "vocab_size": len(vocabulary()),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}
_DEEPSEEK_V2 = {**_LATENT, "topk_method": "greedy"}
_DEEPSEEK_V3 = {**_LATENT, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    section = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0, **parameters}
    return {"rope_parameters": section}


@dataclass(frozen=True)
class Variant:
    """A transformers model class and what its config has besides the sizes.

    ``legacy`` writes the rotary embedding as transformers did before version 5.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    legacy: bool = False


LLAMA3 = scaled("llama3", original_max_position_embeddings=ORIGINAL, **_LLAMA3)
YARN = scaled("yarn", original_max_position_embeddings=ORIGINAL)

VARIANTS = {
    "llama": Variant("Llama"),
    "llama with biases": Variant("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, rope linear": Variant("Llama", scaled("linear")),
    "llama, rope linear, as before": Variant("Llama", scaled("linear"), legacy=True),
    "llama, rope dynamic": Variant("Llama", scaled("dynamic")),
    "llama, rope llama3": Variant("Llama", LLAMA3),
    "llama, rope llama3, as before": Variant("Llama", LLAMA3, legacy=True),
    "llama, rope yarn": Variant("Llama", YARN),
    "qwen2, rope yarn, as before": Variant("Qwen2", YARN, legacy=True),
    "llama, rope yarn, every setting": Variant(
        "Llama",
        scaled(
            "yarn",
            original_max_position_embeddings=ORIGINAL,
            beta_fast=4.0,
            beta_slow=0.2,
            mscale=0.7,
            mscale_all_dim=1.1,
            truncate=False,
        ),
    ),
    "llama, rope yarn, own attention factor": Variant(
        "Llama",
        scaled("yarn", original_max_position_embeddings=ORIGINAL, attention_factor=1.3),
    ),
    "llama, rope longrope with one list": Variant(
        "Llama",
        scaled(
            "longrope",
            original_max_position_embeddings=ORIGINAL,
            short_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            attention_factor=1.1,
        ),
    ),
    "mistral": Variant("Mistral", {"sliding_window": None}),
    "mistral, window": Variant("Mistral", {"sliding_window": WINDOW}),
    "mistral, window of one block": Variant("Mistral", {"sliding_window": 16, "head_dim": 24}),
    "qwen2": Variant("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window of the upper layers": Variant("Qwen2", {**_QWEN_WINDOW, "max_window_layers": 1}),
    "qwen2, window by list": Variant(
        "Qwen2", {**_QWEN_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "qwen3": Variant("Qwen3", {"head_dim": 24}),
    "qwen3 with biases": Variant("Qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3, window": Variant("Qwen3", {"head_dim": 16, **_QWEN_WINDOW, "max_window_layers": 0}),
    "mixtral": Variant("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window, one expert each": Variant(
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": WINDOW},
    ),
    "qwen3 moe": Variant("Qwen3Moe", {**_MOE, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3 moe, weights as they are": Variant("Qwen3Moe", {**_MOE, "norm_topk_prob": False}),
    "qwen3 moe, every second layer": Variant(
        "Qwen3Moe", {**_MOE, "num_hidden_layers": 3, "decoder_sparse_step": 2}
    ),
    "qwen3 moe, a dense layer, window": Variant(
        "Qwen3Moe",
        {**_MOE, "mlp_only_layers": [0], "attention_bias": True, **_QWEN_WINDOW},
    ),
    "smollm3": Variant("SmolLM3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "smollm3, layers by list": Variant(
        "SmolLM3", {"no_rope_layers": [0, 1], "tie_word_embeddings": False}
    ),
    "deepseek v2": Variant("DeepseekV2", _DEEPSEEK_V2),
    "deepseek v2, queries without a latent vector": Variant(
        "DeepseekV2", {**_DEEPSEEK_V2, "q_lora_rank": None, "attention_bias": True}
    ),
    "deepseek v2, groups": Variant(
        "DeepseekV2",
        {**_DEEPSEEK_V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek v2, rope yarn, as before": Variant(
        "DeepseekV2",
        {
            **_DEEPSEEK_V2,
            "attention_bias": True,
            **scaled(
                "yarn",
                original_max_position_embeddings=ORIGINAL,
                mscale=0.7,
                mscale_all_dim=0.7,
            ),
        },
        legacy=True,
    ),
    "deepseek v3": Variant("DeepseekV3", _DEEPSEEK_V3),
    "deepseek v3, rope yarn": Variant(
        "DeepseekV3",
        {
            **_DEEPSEEK_V3,
            "attention_bias": True,
            **scaled(
                "yarn",
                original_max_position_embeddings=ORIGINAL,
                mscale=0.7,
                mscale_all_dim=1.1,
            ),
        },
    ),
    "deepseek v3, rope linear, one group, weights as they are": Variant(
        "DeepseekV3",
        {
            **_DEEPSEEK_V3,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            **scaled("linear"),
        },
    ),
    "deepseek v3, halves are turned": Variant(
        "DeepseekV3",
        {**_DEEPSEEK_V3, "rope_interleave": False, "tie_word_embeddings": True},
    ),
}


def save_variant(folder: Path, variant: Variant, *, shard_size: str = "1GB") -> Any:
    """Writes the variant's random checkpoint to ``folder``; returns transformers' own model."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{variant.architecture}Config")(
            **{**_SIZES, **variant.config}
        )
        model = getattr(transformers, f"{variant.architecture}ForCausalLM")(config).eval()
        _randomize(model)
        model.save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    if variant.legacy:
        _write_as_before(folder / "config.json")
    return model


def oracle_logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def _randomize(model: Any) -> None:
    """Weights that are large enough for logits to differ clearly: no near-ties."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=random)
            if "norm" in name:
                values = 1 + 0.2 * values
            elif name.endswith(".bias"):
                values *= 0.2
            elif "embed_tokens" not in name and "lm_head" not in name:
                values *= 2 / parameter.shape[-1] ** 0.5
            parameter.copy_(values)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=random))
    model.tie_weights()


def _write_as_before(path: Path) -> None:
    config = json.loads(path.read_text())
    section = config.pop("rope_parameters")
    config["rope_theta"] = section.pop("rope_theta")
    section["type"] = section.pop("rope_type")
    write_json(path, {**config, "rope_scaling": section})
