"""``config.json`` from the metadata of a GGUF file of the Llama family."""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Any

from baton.checkpoint.gguf_fields import GgufFields

_NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
}
"""Keys that would change the computation, and the value with which they do not."""

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
    "vocab_size",
}


def model_config(fields: GgufFields, tensor_names: Collection[str]) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError for what is not supported."""
    _refuse_unsupported(fields, tensor_names)
    num_heads = fields.require("llama.attention.head_count", int)
    hidden_size = fields.require("llama.embedding_length", int)
    epsilon = fields.require("llama.attention.layer_norm_rms_epsilon", float)
    theta = _shortest(fields.optional("llama.rope.freq_base", float) or 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": fields.require("llama.block_count", int),
        "hidden_size": hidden_size,
        "intermediate_size": fields.require("llama.feed_forward_length", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.optional("llama.attention.head_count_kv", int) or num_heads,
        "head_dim": _head_dim(fields, num_heads, hidden_size),
        "vocab_size": len(fields.require("tokenizer.ggml.tokens", list)),
        "max_position_embeddings": fields.require("llama.context_length", int),
        "rms_norm_eps": _shortest(epsilon),
        # Readers of before and since transformers 5 look in different places.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "attention_bias": "blk.0.attn_q.bias" in tensor_names,
        "mlp_bias": "blk.0.ffn_up.bias" in tensor_names,
        "bos_token_id": fields.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": fields.optional("tokenizer.ggml.eos_token_id", int),
    }


def _refuse_unsupported(fields: GgufFields, tensor_names: Collection[str]) -> None:
    architecture = fields.require("general.architecture", str)
    if architecture != "llama":
        fields.fail(f"architecture {architecture!r} is not supported; supported is 'llama'")
    if (fields.optional("split.count", int) or 1) > 1:
        fields.fail("a GGUF split over several files is not supported; merge it into one")
    for key, value in fields.values.items():
        name = key.removeprefix("llama.")
        if name == key or name in _READ:
            continue
        if name not in _NEUTRAL or value != _NEUTRAL[name]:
            fields.fail(f"{key} = {value!r:.80} is not supported")
    if "rope_freqs.weight" in tensor_names:
        fields.fail("rope_freqs.weight (scaled rotary embeddings) is not supported")
    size = fields.optional("llama.vocab_size", int)
    if size not in (None, len(fields.require("tokenizer.ggml.tokens", list))):
        fields.fail(f"llama.vocab_size {size} differs from the number of tokenizer.ggml.tokens")


def _head_dim(fields: GgufFields, num_heads: int, hidden_size: int) -> int:
    head_dim = fields.optional("llama.attention.key_length", int) or hidden_size // num_heads
    for name in ("attention.value_length", "rope.dimension_count"):
        other = fields.optional(f"llama.{name}", int)
        if other not in (None, head_dim):
            fields.fail(f"llama.{name} {other} is not supported; expected the head's {head_dim}")
    return head_dim


def _shortest(value: float) -> float:
    """The shortest decimal that means this float32: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value
