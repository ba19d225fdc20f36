"""Sums over ranks what each of them computes from its part of a layer's features."""

from __future__ import annotations

from engine.layers import Layer
from engine.parallel.group import ParallelGroup


def summed(layer: Layer, group: ParallelGroup) -> Layer:
    """``layer`` itself where one rank computes all of it; else the sum, in float32."""
    if group.size == 1:
        return layer
    return lambda x: group.all_reduce_(layer(x).float())
