"""All layers of a dense decoder by one call a step: the Python side of layers.h.

Eleven calls a layer took 2.0 to 2.5 of the 10 ms of a processor's time that a decode step of
SmolLM2 had at one stream. Where a model, a machine or a step has no such call,
``engine.models.decoder`` computes layer by layer, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from ctypes import POINTER, Structure, addressof, byref, c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.native.kernels import Kernels, Pool


@dataclass(frozen=True, slots=True)
class Panels:
    """A linear layer as ``Kernels.multiply`` reads it."""

    weight: Tensor
    bias: Tensor | None
    num_outputs: int


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The weights of one layer; norms are float32, ``head_norm`` is [heads + KV heads, head_dim],
    or None. ``window`` is how far back tokens attend; None for all."""

    attention_norm: Tensor
    qkv: Panels
    head_norm: Tensor | None
    rotates: bool
    window: int | None
    out: Panels
    mlp_norm: Tensor
    gate_up: Panels
    down: Panels


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Consecutive rows of one sequence, which ``num_before`` tokens precede."""

    first_row: int
    num_tokens: int
    num_before: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """What a step's rows attend to: decodes first, a row and a context each, then chunks.

    ``slots``: int64 [tokens]; ``block_table``, ``contexts``: int32 [decodes, most blocks] and
    [decodes].
    """

    pool: Pool
    scale: float
    slots: Tensor
    block_table: Tensor
    contexts: Tensor
    chunks: tuple[ChunkSpan, ...]


class _LayerWeights(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "head_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((f"{name}_bias", c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        ("window", c_int64),
        ("rotates", c_int64),
    )


class _LayerSizes(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_layers", "hidden", "inner", "num_heads")),
        ("norm_eps", c_double),
        ("scale", c_double),
    )


class _ChunkSpan(Structure):
    _fields_ = (
        ("blocks", c_void_p),
        *((name, c_int64) for name in ("first_row", "num_tokens", "num_before")),
    )


class _PackedStep(Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("cos", "sin", "slots", "block_table", "contexts")),
        *((name, c_int64) for name in ("num_decodes", "table_width")),
        ("chunks", c_void_p),
        ("num_chunks", c_int64),
    )


class NativeLayers:
    """Layers of equal sizes, in bfloat16, whose norms have one ``eps``."""

    def __init__(
        self, kernels: Kernels, layers: SequenceOf[DenseLayer], *, num_heads: int, eps: float
    ) -> None:
        first = layers[0]
        self._hidden = len(first.mlp_norm)
        inner = first.gate_up.num_outputs // 2
        assert all(layer.gate_up.num_outputs == 2 * inner for layer in layers)
        self._layers = tuple(layers)  # whose memory is read by every call
        self._weights = (_LayerWeights * len(layers))(*map(_weights, layers))
        self._sizes = _LayerSizes(len(layers), self._hidden, inner, num_heads, eps)
        size = (POINTER(Pool), POINTER(_LayerSizes), c_int64)
        self._size = kernels.function("activations_size", *size, result=c_int64)
        compute = (POINTER(Pool), POINTER(_LayerSizes), c_void_p, POINTER(_PackedStep))
        self._compute = kernels.function("compute_layers", *compute, *(c_void_p,) * 3, c_int)
        self._num_weights = sum(
            each.weight.numel() for layer in layers for each in _products(layer)
        )
        self._memory = torch.empty(0, dtype=torch.bfloat16)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, spans: PagedSpans) -> Tensor:
        """Adds to the residual stream ``x`` (contiguous float32 [tokens, hidden]) what all layers
        bring but the last MLP's part, which is returned (bfloat16, like ``x``); writes KV.

        ``cos``, ``sin``: contiguous float32 [tokens, head_dim / 2].
        """
        rows = len(x)
        assert x.shape == (rows, self._hidden)
        assert x.dtype == cos.dtype == sin.dtype == torch.float32
        assert cos.shape == sin.shape == (rows, spans.pool.head_dim // 2)
        assert spans.block_table.dtype == spans.contexts.dtype == torch.int32
        assert len(spans.slots) == rows
        assert all(each.is_contiguous() for each in (x, cos, sin, spans.slots, spans.block_table))
        self._sizes.scale = spans.scale
        chunks = (_ChunkSpan * len(spans.chunks))(
            *(
                _ChunkSpan(
                    each.block_table.data_ptr(), each.first_row, each.num_tokens, each.num_before
                )
                for each in spans.chunks
            )
        )
        num_decodes, table_width = spans.block_table.shape
        step = _PackedStep(
            *(rows, cos.data_ptr(), sin.data_ptr(), spans.slots.data_ptr()),
            *(spans.block_table.data_ptr(), spans.contexts.data_ptr(), num_decodes, table_width),
            *(addressof(chunks), len(chunks)),
        )
        pool, sizes = byref(spans.pool), byref(self._sizes)
        needed = self._size.for_work(0)(pool, sizes, rows)
        if self._memory.numel() < needed:
            self._memory = torch.empty(needed, dtype=torch.bfloat16)
        delta = torch.empty(rows, self._hidden, dtype=torch.bfloat16)
        self._compute.for_work(self._num_weights)(
            *(pool, sizes, self._weights, byref(step), x.data_ptr(), delta.data_ptr()),
            *(self._memory.data_ptr(), torch.get_num_threads()),
        )
        return delta


def _products(layer: DenseLayer) -> tuple[Panels, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _weights(layer: DenseLayer) -> _LayerWeights:
    return _LayerWeights(
        *map(_pointer, (layer.attention_norm, layer.head_norm, layer.mlp_norm)),
        *(_pointer(each.weight) for each in _products(layer)),
        *(_pointer(each.bias) for each in _products(layer)),
        layer.window or 0,
        layer.rotates,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
