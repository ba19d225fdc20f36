"""Whether all layers of a decoder can be computed by one call of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from baton.checkpoint.model_config import ModelConfig
from engine.layers import Layer, Linear, RMSNorm
from engine.models.latent_attention import LatentAttention
from engine.models.mlp import DenseMlp, Mlp
from engine.models.self_attention import SelfAttention
from engine.native.kernels import kernels
from engine.native.layers import DenseLayer, NativeLayers, Panels


class DecoderLayer(Protocol):
    attention_norm: RMSNorm
    attention: SelfAttention | LatentAttention
    mlp_norm: RMSNorm
    mlp: Mlp


def native_layers(config: ModelConfig, layers: SequenceOf[DecoderLayer]) -> NativeLayers | None:
    """None where one of ``layers`` is of another kind, is one of several ranks' parts, or keeps
    its weights otherwise than as panels of bfloat16, or where this process has no kernels."""
    native = kernels()
    windows = config.parts.windows or (None,) * len(layers)
    dense = [_dense(layer, window) for layer, window in zip(layers, windows, strict=True)]
    every = [layer for layer in dense if layer is not None]
    if native is None or config.rotary_dim != config.head_dim or len(every) < len(dense):
        return None
    return NativeLayers(native, every, num_heads=config.num_heads, eps=config.rms_norm_eps)


def _dense(layer: DecoderLayer, window: int | None) -> DenseLayer | None:
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(attention, SelfAttention) or not isinstance(mlp, DenseMlp):
        return None
    qkv, out = _panels(attention.qkv), _panels(attention.out)
    gate_up, down = _panels(mlp.gate_up), _panels(mlp.down)
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    return DenseLayer(
        attention_norm=layer.attention_norm.weight,
        qkv=qkv,
        head_norm=attention.qk_norm.weight if attention.qk_norm is not None else None,
        rotates=attention.rotates,
        window=window,
        out=out,
        mlp_norm=layer.mlp_norm.weight,
        gate_up=gate_up,
        down=down,
    )


def _panels(layer: Layer) -> Panels | None:
    return layer.panels if isinstance(layer, Linear) else None
