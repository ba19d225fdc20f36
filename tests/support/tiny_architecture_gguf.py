"""Tiny Hugging Face folders of any architecture as GGUF files, as llama.cpp would convert them.

Names come from the gguf package's own tables, not from ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from support.tiny_models import tokenizer_fields, write_gguf

GgufArrays = dict[str, np.ndarray[Any, Any]]

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.")
_STACKS = {"w1": "gate", "w2": "down", "w3": "up"}


def gguf_of(
    path: Path,
    folder: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    extra_tensors: GgufArrays | None = None,
    raw: GgufArrays | None = None,
) -> Path:
    """Writes the folder's model to ``path``; ``fields`` adds metadata without their prefix.

    ``raw`` replaces tensors by bytes of ``kind``; the others are then F32.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = _ARCHITECTURES[config["model_type"]]
    prefix = gguf.MODEL_ARCH_NAMES[arch]
    own = {f"{prefix}.{key}": value for key, value in (_sizes(config) | (fields or {})).items()}
    return write_gguf(
        path,
        {"general.architecture": prefix, **own, **tokenizer_fields()},
        gguf_tensors(folder, config, arch) | (extra_tensors or {}) | (raw or {}),
        kind=kind,
        raw_only=raw is not None,
    )


def gguf_tensors(folder: Path, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> GgufArrays:
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {}
    if arch == gguf.MODEL_ARCH.LLAMA:
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: GgufArrays = {}
    stacks: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for name, array in load_file(folder / "model.safetensors").items():
        if match := _EXPERT.match(name):
            part = _STACKS.get(match[3], match[3].removesuffix("_proj"))
            stack = stacks.setdefault(f"blk.{match[1]}.ffn_{part}_exps.weight", {})
            stack[int(match[2])] = array
            continue
        num_heads = heads.get(name.split(".")[-2])
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = array if num_heads is None else _llama_cpp_rows(array, num_heads)
    for name, stack in stacks.items():
        tensors[name] = np.stack([stack[expert] for expert in range(len(stack))])
    return tensors


def _llama_cpp_rows(array: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """The permutation of llama.cpp's conversion script."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    experts = {
        "num_experts": "expert_count",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    }
    return sizes | {theirs: config[ours] for ours, theirs in experts.items() if ours in config}
