"""Writes tiny random models of the Llama family, as Hugging Face folders and GGUF files.

The weights are large enough that logits differ clearly, so greedy decoding has no
near-ties. The tokenizer is a byte-level BPE with a few merges and ChatML tokens; its
vocabulary and all sizes divide by 2, and with the defaults by tensor parallelism of 4.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

if TYPE_CHECKING:
    import gguf  # a machine with a GPU may do without, for the models alone

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS, EOS = 1, 2
MERGES = [
    *(("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz"),
    ("h", "e"),
    ("i", "n"),
    ("Ġt", "he"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of a tiny model; ``head_dim`` 0 means hidden_size / num_heads."""

    num_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 0
    max_position: int = 1024
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    seed: int = 0

    @property
    def dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


def vocabulary() -> list[str]:
    """Tokens in the order of their ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL_TOKENS, *alphabet, *(left + right for left, right in MERGES)]


def config_json(model: TinyLlama, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The content of config.json, as transformers 5 writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.dim,
        "vocab_size": len(vocabulary()),
        "max_position_embeddings": model.max_position,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def tiny_tensors(model: TinyLlama) -> dict[str, torch.Tensor]:
    """Random fp32 weights by their Hugging Face names; a pure function of ``model``."""
    random = torch.Generator().manual_seed(model.seed)
    hidden, inner, vocab = model.hidden_size, model.intermediate_size, len(vocabulary())
    queries, keys = model.num_heads * model.dim, model.num_kv_heads * model.dim

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=random)

    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=random)}
    projections = {
        "self_attn.q_proj": (queries, hidden, model.attention_bias),
        "self_attn.k_proj": (keys, hidden, model.attention_bias),
        "self_attn.v_proj": (keys, hidden, model.attention_bias),
        "self_attn.o_proj": (hidden, queries, model.attention_bias),
        "mlp.gate_proj": (inner, hidden, model.mlp_bias),
        "mlp.up_proj": (inner, hidden, model.mlp_bias),
        "mlp.down_proj": (hidden, inner, model.mlp_bias),
    }
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = norm()
        for name, (rows, columns, has_bias) in projections.items():
            tensors[f"{prefix}.{name}.weight"] = 2 * matrix(rows, columns)
            if has_bias:
                tensors[f"{prefix}.{name}.bias"] = 0.2 * torch.randn(rows, generator=random)
    tensors["model.norm.weight"] = norm()
    if not model.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(vocab, hidden) * hidden**0.5
    return tensors


def write_tiny_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, num_shards: int = 1, **sizes: Any
) -> Path:
    """Writes a complete Hugging Face folder; ``sizes`` are the fields of TinyLlama."""
    model = replace(TinyLlama(), **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(model, dtype))
    write_tokenizer(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors(model).items()}
    _write_weights(folder, tensors, num_shards)
    return folder


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the tiny vocabulary."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL_TOKENS[BOS], "eos_token": SPECIAL_TOKENS[EOS]}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": CHAT_TEMPLATE},
    )


def write_tiny_gguf(
    path: Path,
    *,
    kind: gguf.GGMLQuantizationType | None = None,
    fields: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    **sizes: Any,
) -> Path:
    """Writes the same model as a GGUF file with matrices of ``kind``, by default float32,
    as llama.cpp would.

    ``fields`` adds metadata, or replaces it (None leaves a key out).
    """
    model = replace(TinyLlama(), **sizes)
    tensors = {
        _gguf_name(name, model): _llama_cpp_rows(name, tensor, model)
        for name, tensor in tiny_tensors(model).items()
    }
    data = _gguf_fields(model) | tokenizer_fields() | (fields or {})
    return write_gguf(path, data, tensors | (extra_tensors or {}), kind=kind)


def write_gguf(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    *,
    kind: gguf.GGMLQuantizationType | None = None,
    raw_only: bool = False,
) -> Path:
    """Writes a GGUF file of these metadata and tensors, matrices as ``kind``; a tensor of
    bytes is stored as it is, with ``raw_only`` alone as ``kind``."""
    import gguf

    kind = gguf.GGMLQuantizationType.F32 if kind is None else kind
    fields = {"general.architecture": "llama"} | fields
    writer = gguf.GGUFWriter(path, arch=fields.pop("general.architecture"))
    for key, value in fields.items():
        _add_field(writer, key, value)
    for name, data in tensors.items():
        if data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=kind)
        elif data.ndim > 1 and not raw_only:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary())}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def tokenizer_fields() -> dict[str, Any]:
    """The metadata of a GGUF file that describe the tiny vocabulary."""
    tokens = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in MERGES],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _gguf_fields(model: TinyLlama) -> dict[str, Any]:
    return {
        "llama.block_count": model.num_layers,
        "llama.context_length": model.max_position,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.intermediate_size,
        "llama.attention.head_count": model.num_heads,
        "llama.attention.head_count_kv": model.num_kv_heads,
        "llama.attention.key_length": model.dim,
        "llama.attention.value_length": model.dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": model.rope_theta,
        "llama.rope.dimension_count": model.dim,
        "llama.vocab_size": len(vocabulary()),
    }


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@functools.cache
def _gguf_names(num_layers: int) -> gguf.TensorNameMap:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)


def _gguf_name(name: str, model: TinyLlama) -> str:
    """By the gguf package's own table, not by ours."""
    found = _gguf_names(model.num_layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _llama_cpp_rows(name: str, tensor: torch.Tensor, model: TinyLlama) -> np.ndarray[Any, Any]:
    """Query and key rows in the order of llama.cpp's conversion script."""
    heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor.numpy()
    rows = tensor.reshape(heads, 2, model.dim // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape).contiguous().numpy()
