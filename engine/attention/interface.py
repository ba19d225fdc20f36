"""What the model asks of attention, whatever computes it.

A backend is bound to one KV pool. ``begin`` does the index arithmetic of a step
once; the model then calls the result once per layer.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.batch import Batch
from engine.native.layers import PagedSpans


class AttentionStep(Protocol):
    """Attention of one packed step, layer by layer."""

    def __call__(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Writes the tokens' KV to their slots, then attends causally within each sequence,
        as far back as the layer's window, if it has one.

        ``query`` is [tokens, heads, head_dim], ``key_value`` [tokens, 2, KV heads,
        head_dim]. Returns a contiguous [tokens, heads, head_dim]. Query head h reads KV
        head h // (heads / KV heads); scores are scaled by head_dim ** -0.5.

        In a pool of one part, ``key_value`` is [tokens, 1, KV heads, head_dim]: the first
        ``value_dim`` elements of a key are its value. That length, which then is the last of
        the result, and the scale are what the backend was made with.
        """
        ...

    def paged_spans(self) -> PagedSpans | None:
        """What the step's rows attend to, for who computes all layers at once by the CPU
        kernels; None where they cannot."""
        ...


class Attention(Protocol):
    """One way of computing attention over a paged KV pool."""

    def begin(self, batch: Batch) -> AttentionStep:
        """Prepares a step; valid until the next ``begin``."""
        ...
