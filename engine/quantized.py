"""Linear layers whose weights are kept in 8 or 4 bits; activations stay as they are.

The weights are rounded as they are loaded, from whatever the checkpoint has. Products are
torch's own CPU kernels for such weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from baton.errors import ConfigurationError
from engine.layers import Layer, Linear

Quantization = Literal["none", "int8", "int4"]

GROUP_SIZE = 32
"""Inputs that share a scale and a zero in 4 bits."""
_OUTPUTS = 64
"""4-bit weights come in such numbers of outputs."""


class Int8Linear:
    """``weight`` [out, in] in 8 bits, with one scale for each output: symmetric, to the nearest."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        whole = weight.float()
        scales = (whole.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        self._scales = scales.to(weight.dtype)
        steps = whole / self._scales.float()[:, None]
        self._weight = steps.round_().clamp_(-127, 127).to(torch.int8)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out]."""
        out = torch._weight_int8pack_mm(x, self._weight, self._scales)
        return out if self._bias is None else out.add_(self._bias)


class Int4Linear:
    """``weight`` [out, in] in 4 bits: each ``GROUP_SIZE`` inputs of an output lie between their
    least and their largest, in 15 equal steps.

    Raises ConfigurationError for a shape that cannot be cut so.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        num_outputs, num_inputs = weight.shape
        if num_inputs % GROUP_SIZE or num_outputs % _OUTPUTS:
            raise ConfigurationError(
                f"engine.quantization int4 cannot keep a layer of {num_inputs} inputs and "
                f"{num_outputs} outputs, because it takes {GROUP_SIZE} and {_OUTPUTS} at a time; "
                "use int8, or fewer ranks"
            )
        groups = weight.float().view(num_outputs, -1, GROUP_SIZE)
        least, largest = groups.amin(dim=2), groups.amax(dim=2)
        scale = ((largest - least) / 15).clamp_(min=torch.finfo(torch.float32).tiny)
        # A number n stands for (n - 8) · scale + zero, both rounded as they will be kept.
        scale = scale.to(weight.dtype).float()
        zero = (least + 8 * scale).to(weight.dtype).float()
        numbers = ((groups - zero[..., None]) / scale[..., None]).round_().add_(8).clamp_(0, 15)
        self._weight = torch._convert_weight_to_int4pack_for_cpu(
            numbers.view(num_outputs, num_inputs).int(), 1
        )
        both = torch.stack([scale, zero], dim=-1).to(weight.dtype)  # [out, groups, 2]
        self._scales_and_zeros = both.transpose(0, 1).contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] → [tokens, out]."""
        out = torch._weight_int4pack_mm_for_cpu(x, self._weight, GROUP_SIZE, self._scales_and_zeros)
        return out if self._bias is None else out.add_(self._bias)


def linear(weight: Tensor, bias: Tensor | None, quantization: Quantization) -> Layer:
    """The layer that computes ``x Wᵀ + b`` from weights so kept."""
    kinds: dict[Quantization, Callable[[Tensor, Tensor | None], Layer]] = {
        "none": Linear,
        "int8": Int8Linear,
        "int4": Int4Linear,
    }
    return kinds[quantization](weight, bias)
