"""A model's tensors, taken by name and made into layers."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from engine.layers import Layer, Linear, RMSNorm
from engine.parallel.shard import WHOLE, scaled
from engine.quantized import Quantization, linear


class Tensors:
    """The tensors under one prefix of Hugging Face names; ``linear`` layers keep their weights
    as ``quantization`` says."""

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str, quantization: Quantization = "none"
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._quantization: Quantization = quantization

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[f"{self._prefix}.{name}"]

    def under(self, name: str) -> Tensors:
        return Tensors(self._tensors, f"{self._prefix}.{name}", self._quantization)

    def linear(
        self,
        *names: str,
        outputs: SequenceOf[slice] | None = None,
        inputs: slice = WHOLE,
        has_bias: bool = True,
    ) -> Layer:
        """One layer that computes the outputs of several, side by side.

        Of each it may take a range of ``outputs``, and of all a range of ``inputs``: then
        the layers of all ranks are to be summed, and only one of them may have the biases.
        """
        rows = outputs or [WHOLE] * len(names)
        weights = [
            self[f"{name}.weight"][each, inputs] for name, each in zip(names, rows, strict=True)
        ]
        biases = [self._tensors.get(f"{self._prefix}.{name}.bias") for name in names]
        present = [bias[each] for bias, each in zip(biases, rows, strict=True) if bias is not None]
        assert len(present) in (0, len(biases)), f"{self._prefix}: some biases are missing"
        bias = torch.cat(present) if present and has_bias else None
        return linear(torch.cat(weights), bias, self._quantization)

    def router(self, name: str) -> Linear:
        """One layer whose weights stay as they are: what decides on experts is not rounded."""
        return Linear(self[f"{name}.weight"], self._tensors.get(f"{self._prefix}.{name}.bias"))

    def by_head(self, name: str, heads: slice, head_dim: int) -> Tensor:
        """[heads, head_dim, in]: some heads of a projection whose ``head_dim`` outputs of a
        head lie side by side, for products that no linear layer expresses. A view, if it is all."""
        weight = self[f"{name}.weight"]
        own = weight[scaled(heads, head_dim)]
        own = own if len(own) == len(weight) else own.clone()
        return own.view(-1, head_dim, weight.shape[1])

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self[f"{name}.weight"], eps)
