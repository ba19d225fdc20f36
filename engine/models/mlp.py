"""The dense MLP of a layer, and the shape that every kind of MLP has."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.layers import swiglu
from engine.models.tensors import Tensors


class Mlp(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] → [tokens, hidden], in the weights' dtype or float32."""
        ...


class DenseMlp:
    """SwiGLU between two projections; the names are those of its three tensors."""

    def __init__(
        self,
        tensors: Tensors,
        *,
        gate: str = "gate_proj",
        up: str = "up_proj",
        down: str = "down_proj",
    ) -> None:
        self._gate_up = tensors.linear(gate, up)
        self._down = tensors.linear(down)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(swiglu(self._gate_up(x)))
