"""Made models, and pools of other degrees of tensor parallelism than each other's."""

from __future__ import annotations

from pathlib import Path

from support.tiny_architectures import VARIANTS, save_variant
from support.tiny_engine import tokens
from support.tiny_models import write_tiny_llama

NUM_TOKENS = 10
PROMPTS = [tokens(75, seed=1), tokens(20, seed=2), tokens(33, seed=3)]
DEGREES = [(1, 2), (2, 1), (4, 2), (2, 4)]
"""Of prefill and of decode."""
_HEADS = {
    "grouped": {"num_heads": 8, "num_kv_heads": 4},
    "multi-head": {"num_heads": 4, "num_kv_heads": 4},
    "replicated": {"num_heads": 8, "num_kv_heads": 2},
}
"""Of models with K and V; with two KV heads, four ranks hold each twice."""
_LATENT = "latent"
KINDS = [*_HEADS, _LATENT]


def write_model(kind: str, folder: Path) -> Path:
    if kind == _LATENT:
        save_variant(folder, VARIANTS["deepseek v2"])
    else:
        write_tiny_llama(folder, **_HEADS[kind])
    return folder
