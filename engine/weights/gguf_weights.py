"""Turns the tensors of a GGUF file into those of the Hugging Face layout, dequantized.

llama.cpp renames the tensors, stacks those of a layer's experts, and for some
architectures reorders the rows of the query and key projections: there its rotary
embedding turns neighbouring pairs (2i, 2i+1) of a head, that of Hugging Face pairs half
a head apart (i, i + head_dim/2). All that is undone here, exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.checkpoint.architectures import ARCHITECTURES
from baton.checkpoint.gguf_metadata import GgufTensor
from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError
from engine.weights.tensor_shapes import EMBEDDING, HEAD, Shape, check_shapes, expected_shapes

_TOP_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK_ELEMENTS = 1024 * 1024
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def check_tensors(path: Path, tensors: Sequence[GgufTensor], config: ModelConfig) -> None:
    """Raises CheckpointError, naming the tensor, for what does not fit config or file."""
    found: dict[str, Shape] = {}
    for tensor in tensors:
        found |= _hugging_face_parts(tensor, config)
    check_shapes(found, expected_shapes(config), str(path))
    num_bytes = path.stat().st_size
    for tensor in tensors:
        if tensor.offset + tensor.num_bytes > num_bytes:
            raise CheckpointError(
                f"{path} is truncated: {tensor.name} ends at byte "
                f"{tensor.offset + tensor.num_bytes}, but the file has {num_bytes}"
            )


def dequantized_tensors(
    path: Path, tensors: Sequence[GgufTensor], config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and fp32 tensor of the Hugging Face layout, one at a time.

    Raises:
        CheckpointError: a tensor's quantization is not supported.
    """
    data = np.memmap(path, mode="r")
    gguf = ARCHITECTURES[config.architecture].gguf
    num_heads = {}
    if gguf is not None and gguf.turns_neighbours:
        num_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for tensor in tensors:
        shapes = _hugging_face_parts(tensor, config)
        parts = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(len(shapes), -1)
        for (name, shape), part in zip(shapes.items(), parts, strict=True):
            values = _dequantize(path, tensor, shape, part)
            if heads := num_heads.get(name.split(".")[-2]):
                values = _undo_row_order(values, heads)
            yield name, torch.from_numpy(values)


def _hugging_face_parts(tensor: GgufTensor, config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of the tensor, or of each expert's where it is a stack of theirs.

    A name that has no counterpart stays as it is, and is then a surplus tensor.
    """
    match = _LAYER.fullmatch(tensor.name)
    if not match:
        return {_TOP_NAMES.get(tensor.name, tensor.name): tensor.shape}
    layer, part, kind = f"model.layers.{match[1]}", match[2], match[3]
    if part in _LAYER_NAMES:
        return {f"{layer}.{_LAYER_NAMES[part]}.{kind}": tensor.shape}
    moe = config.parts.moe
    if moe is None:
        return {tensor.name: tensor.shape}
    block = f"{layer}.{moe.block_name}"
    if part == "ffn_gate_inp":
        return {f"{block}.gate.{kind}": tensor.shape}
    stacks = {
        "ffn_gate_exps": moe.gate_name,
        "ffn_up_exps": moe.up_name,
        "ffn_down_exps": moe.down_name,
    }
    if part not in stacks or len(tensor.shape) != 3:
        return {tensor.name: tensor.shape}
    num_experts, *shape = tensor.shape
    names = [f"{block}.experts.{e}.{stacks[part]}.{kind}" for e in range(num_experts)]
    return dict.fromkeys(names, tuple(shape))


def _dequantize(
    path: Path, tensor: GgufTensor, shape: Shape, data: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # Quantization blocks run along the rows, so that each row is a whole number of bytes.
    values = np.empty((int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]), "f4")
    rows = data.reshape(len(values), -1)
    # Some rows at a time: dequantizing takes several times the memory of its result.
    step = max(1, _CHUNK_ELEMENTS // shape[-1])
    try:
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            values[chunk] = dequantize(rows[chunk], GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: {tensor.name} is stored as {tensor.kind}, which is not supported"
        ) from error
    return values.reshape(shape)


def _undo_row_order(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from (pair, half) order back to (half, pair); weights or biases."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
