"""The Triton kernels of fused.py: what a decoder does between its matrix products.

Computed in float32 whatever the activations are. Parameters in capitals are compile-time
constants; a ``..._PAD`` is a size rounded up to a power of two. Others have no types: triton
would take an annotation for a variable.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    x,
    delta,
    weight,
    out,
    eps,
    FEATURES: tl.constexpr,
    FEATURES_PAD: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """Program (row): ``x += delta``, and the root mean square norm of the sum to ``out``."""
    row = tl.program_id(0).to(tl.int64) * FEATURES
    columns = tl.arange(0, FEATURES_PAD)
    inside = columns < FEATURES
    values = tl.load(x + row + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        values += tl.load(delta + row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row + columns, values, mask=inside)
    mean = tl.sum(values * values, 0) / FEATURES
    scales = tl.load(weight + columns, mask=inside, other=0.0)
    normed = values * (1.0 / tl.sqrt(mean + eps)) * scales
    tl.store(out + row + columns, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    heads,
    row_stride,
    cosines,
    sines,
    NUM_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Program (token): turns the pairs (i, i + HALF) of all its heads, which lie side by side."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    pair = tl.arange(0, HALF_PAD)[None, :]
    inside = (head < NUM_HEADS) & (pair < HALF)
    is_pair = pair < HALF
    cosine = tl.load(cosines + token * HALF + pair, mask=is_pair, other=0.0)
    sine = tl.load(sines + token * HALF + pair, mask=is_pair, other=0.0)
    place = heads + token * row_stride + head * (2 * HALF) + pair
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = heads.dtype.element_ty
    tl.store(place, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(place + HALF, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit
def swiglu(gate_up, out, FEATURES: tl.constexpr, TILE: tl.constexpr):
    """Program (row, tile of features): ``silu(gate) · up``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < FEATURES
    place = gate_up + row * (2 * FEATURES) + columns
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + FEATURES, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * FEATURES + columns, product.to(out.dtype.element_ty), mask=inside)
