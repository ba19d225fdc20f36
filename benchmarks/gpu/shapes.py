"""The shapes of the models that are measured, and what a step of one has to move and multiply.

Weights are random ones of these shapes, so nothing is read from a disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baton.checkpoint.checkpoint import Checkpoint
from baton.checkpoint.model_config import ModelConfig
from baton.kv_layout import KvLayout

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "rope_theta": 500_000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8B": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""By name: those of Llama 3.2 1B and Llama 3.1 8B, as their config.json has them."""
BLOCK_SIZE = 16


def checkpoint(name: str) -> Checkpoint:
    """One of SHAPES, with random weights."""
    return Checkpoint(
        name=name,
        folder=Path(),
        weights_source=Path(),
        config=ModelConfig.from_json(SHAPES[name], where=name),
        revision=f"random {name}",
        eos_token_ids=(),
        bos_token=None,
        eos_token=None,
        chat_template=None,
        load_format="dummy",
    )


def layout_of(config: ModelConfig, num_tokens: int) -> KvLayout:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return config.kv_layout(num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype="bfloat16")


def layer_weights(config: ModelConfig) -> int:
    """Elements of the matrices of all layers of a dense decoder: each token meets all of them."""
    heads = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * heads + 2 * keys)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp)


def head_weights(config: ModelConfig) -> int:
    return config.hidden_size * config.vocab_size


def decode_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """That a step of ``batch`` sequences must move, all of bfloat16: every weight once, and the
    KV of each one's ``context`` tokens, of which the last is written."""
    token_bytes = layout_of(config, 1).token_bytes
    return 2 * (layer_weights(config) + head_weights(config)) + batch * context * token_bytes


def prefill_operations(config: ModelConfig, num_tokens: int) -> int:
    """Multiplications and additions of one prompt: of its products with the weights, the head's
    for the last token alone, and of causal attention (both of its products over half a square)."""
    pairs = num_tokens * (num_tokens + 1) // 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2 * (layer_weights(config) * num_tokens + head_weights(config)) + attention
