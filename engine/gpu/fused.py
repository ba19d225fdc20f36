"""What a decoder does between its matrix products, one launch each: for tensors on a GPU.

layers.py calls these for such tensors, and says what each computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu import fused_kernels

_SWIGLU_TILE = 1024
_WIDE = 4096
"""Features of a row that eight warps share rather than four."""


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """``x += delta`` in place, and the root mean square norm of the sum, in ``dtype``.

    ``x``, ``weight``: float32 [rows, features] and [features]; ``delta``: the shape of ``x``.
    """
    rows, features = x.shape
    assert x.is_contiguous()
    assert x.dtype == weight.dtype == torch.float32
    if delta is not None:
        assert delta.shape == x.shape
        delta = delta.contiguous()
    out = torch.empty(rows, features, dtype=dtype, device=x.device)
    fused_kernels.add_rms_norm[(rows,)](
        x, x if delta is None else delta, weight, out, eps,
        FEATURES=features, FEATURES_PAD=_power_of_two(features), HAS_DELTA=delta is not None,
        num_warps=8 if features >= _WIDE else 4,
    )  # fmt: skip
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates ``heads`` ([tokens, heads, dim], a token's own side by side) in place, by float32
    [tokens, dim / 2]."""
    tokens, num_heads, dim = heads.shape
    assert heads[0].is_contiguous()
    assert cos.shape == sin.shape == (tokens, dim // 2)
    fused_kernels.rotate[(tokens,)](
        heads, heads.stride(0), cos.contiguous(), sin.contiguous(),
        NUM_HEADS=num_heads, HEADS_PAD=_power_of_two(num_heads),
        HALF=dim // 2, HALF_PAD=_power_of_two(dim // 2),
    )  # fmt: skip


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` of a contiguous [tokens, 2 × features], gate first."""
    rows, features = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = torch.empty(rows, features, dtype=gate_up.dtype, device=gate_up.device)
    fused_kernels.swiglu[(rows, -(-features // _SWIGLU_TILE))](
        gate_up, out, FEATURES=features, TILE=_SWIGLU_TILE
    )
    return out


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
