"""``config.json`` from the metadata of a GGUF file."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import Any

from baton.checkpoint.architectures import ARCHITECTURES, GgufNames
from baton.checkpoint.gguf_fields import GgufFields

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Keys that would change the computation, and the values with which they do not."""

_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
}


def model_config(
    fields: GgufFields, tensor_names: Collection[str], rope_factors: Sequence[float] | None = None
) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError for what is not supported.

    ``rope_factors`` are what the file's ``rope_freqs.weight`` divides frequencies by.
    """
    name, gguf = _architecture(fields)
    _refuse_unsupported(fields, gguf)
    num_heads = fields.require(fields.own("attention.head_count"), int)
    hidden_size = fields.require(fields.own("embedding_length"), int)
    epsilon = fields.require(fields.own("attention.layer_norm_rms_epsilon"), float)
    head_dim = _head_dim(fields, num_heads, hidden_size)
    rope = _rope(fields, rope_factors)
    config = {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "hidden_act": "silu",
        "num_hidden_layers": fields.require(fields.own("block_count"), int),
        "hidden_size": hidden_size,
        "intermediate_size": fields.require(fields.own("feed_forward_length"), int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.optional(fields.own("attention.head_count_kv"), int)
        or num_heads,
        "head_dim": head_dim,
        "vocab_size": len(fields.items("tokenizer.ggml.tokens", str)),
        "max_position_embeddings": fields.require(fields.own("context_length"), int),
        "rms_norm_eps": _shortest(epsilon),
        # Readers of before and since transformers 5 look in different places.
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        "bos_token_id": fields.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": fields.optional("tokenizer.ggml.eos_token_id", int),
    }
    config |= {theirs: fields.require(fields.own(key), int) for key, theirs in gguf.fields.items()}
    return config | dict(gguf.constants)


def _architecture(fields: GgufFields) -> tuple[str, GgufNames]:
    """The entry of ARCHITECTURES: of two that share a name, one has experts."""
    named = {
        name: entry.gguf
        for name, entry in ARCHITECTURES.items()
        if entry.gguf is not None and entry.gguf.architecture == fields.architecture
    }
    if not named:
        known = {entry.gguf.architecture for entry in ARCHITECTURES.values() if entry.gguf}
        supported = ", ".join(repr(name) for name in sorted(known))
        fields.fail(
            f"architecture {fields.architecture!r} is not supported; supported: {supported}"
        )
    num_experts = fields.optional(fields.own("expert_count"), int) or 0
    for name, gguf in named.items():
        if ("expert_count" in gguf.fields) == (num_experts > 0):
            return name, gguf
    fields.fail(f"{fields.own('expert_count')} = {num_experts} is not supported")


def _refuse_unsupported(fields: GgufFields, gguf: GgufNames) -> None:
    if (fields.optional("split.count", int) or 1) > 1:
        fields.fail("a GGUF split over several files is not supported; merge it into one")
    prefix = fields.own("")
    for key, value in fields.values.items():
        name = key.removeprefix(prefix)
        if name == key or name in _READ or name in gguf.fields:
            continue
        if value not in _NEUTRAL.get(name, ()):
            fields.fail(f"{key} = {value!r:.80} is not supported")
    size = fields.optional(fields.own("vocab_size"), int)
    if size not in (None, len(fields.items("tokenizer.ggml.tokens", str))):
        fields.fail(
            f"{fields.own('vocab_size')} {size} differs from the number of tokenizer.ggml.tokens"
        )


def _head_dim(fields: GgufFields, num_heads: int, hidden_size: int) -> int:
    if num_heads < 1:
        fields.fail(f"{fields.own('attention.head_count')} is {num_heads}; expected 1 or more")
    head_dim = fields.optional(fields.own("attention.key_length"), int) or hidden_size // num_heads
    for name in ("attention.value_length", "rope.dimension_count"):
        other = fields.optional(fields.own(name), int)
        if other not in (None, head_dim):
            fields.fail(
                f"{fields.own(name)} {other} is not supported; expected the head's {head_dim}"
            )
    return head_dim


def _rope(fields: GgufFields, factors: Sequence[float] | None) -> dict[str, Any]:
    """``rope_parameters``, as transformers has them."""
    theta = _shortest(fields.optional(fields.own("rope.freq_base"), float) or 10000.0)
    key = fields.own("rope.scaling.type")
    kind = fields.optional(key, str) or "none"
    factor = fields.optional(fields.own("rope.scaling.factor"), float)
    if factor is None:
        factor = fields.optional(fields.own("rope.scale_linear"), float)
        kind = "linear" if kind == "none" and factor is not None else kind
    # llama.cpp takes a factor of 0 for none.
    scale = _shortest(factor) if factor else 1.0
    if kind not in ("none", "linear", "yarn"):
        fields.fail(f"{key} = {kind!r} is not supported")
    if factors is not None and (kind != "none" or scale != 1.0):
        fields.fail(f"{key} = {kind!r} together with rope_freqs.weight is not supported")
    if factors is not None:
        # Of Llama 3.1 and later: LongRoPE by its two lists, here one and the same.
        lists = {"short_factor": list(factors), "long_factor": list(factors)}
        fixed = {"factor": 1.0, "attention_factor": 1.0}
        length = fields.require(fields.own("context_length"), int)
        original = {"original_max_position_embeddings": length}
        return {"rope_type": "longrope", "rope_theta": theta, **lists, **fixed, **original}
    if scale == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": scale}
    if kind == "linear":
        return rope
    if kind == "none":
        fields.fail(f"{fields.own('rope.scaling.factor')} {scale} without a type is not supported")
    original_key = fields.own("rope.scaling.original_context_length")
    rope["original_max_position_embeddings"] = fields.require(original_key, int)
    for name in ("beta_fast", "beta_slow"):
        value = fields.optional(fields.own(f"rope.scaling.yarn_{name}"), float)
        if value is not None:
            rope[name] = _shortest(value)
    return rope


def _shortest(value: float) -> float:
    """The shortest decimal that means this float32: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value
