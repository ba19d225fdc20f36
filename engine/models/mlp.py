"""The dense MLP of a layer, and the shape that every kind of MLP has."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.layers import swiglu
from engine.models.tensors import Tensors
from engine.parallel.shard import WHOLE


class Mlp(Protocol):
    def __call__(self, x: Tensor, /) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], in the weights' dtype or float32."""
        ...


class DenseMlp:
    """SwiGLU between two projections; the names are those of its three tensors.

    With a range of ``inner`` features it is one summand of the MLP.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        gate: str = "gate_proj",
        up: str = "up_proj",
        down: str = "down_proj",
        inner: slice = WHOLE,
        has_bias: bool = True,
    ) -> None:
        self.gate_up = tensors.linear(gate, up, outputs=[inner, inner])
        self.down = tensors.linear(down, inputs=inner, has_bias=has_bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
