"""A model's tensors, taken by name and made into layers: the one place where a Linear is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.layers import Linear, RMSNorm


class Tensors:
    """The tensors under one prefix of Hugging Face names."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[f"{self._prefix}.{name}"]

    def under(self, name: str) -> Tensors:
        return Tensors(self._tensors, f"{self._prefix}.{name}")

    def linear(self, *names: str) -> Linear:
        """One layer that computes the outputs of several, side by side."""
        weights = [self[f"{name}.weight"] for name in names]
        biases = [self._tensors.get(f"{self._prefix}.{name}.bias") for name in names]
        present = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(biases)), f"{self._prefix}: some biases are missing"
        return Linear(torch.cat(weights), torch.cat(present) if present else None)

    def norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self[f"{name}.weight"], eps)
