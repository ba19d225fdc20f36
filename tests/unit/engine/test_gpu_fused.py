"""The kernels between a GPU's products, in Triton's interpreter, equal what a CPU computes."""

from __future__ import annotations

import pytest
import torch
from support.triton_cases import interpreted_or_skip

from engine.layers import RMSNorm, Rotary
from engine.layers import swiglu as swiglu_of_layers

fused = interpreted_or_skip("engine.gpu.fused")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 100, 576])
@pytest.mark.parametrize("has_delta", [False, True])
def test_a_norm_is_that_of_the_layers(features: int, has_delta: bool, dtype: torch.dtype) -> None:
    x, weight = normal(5, features), normal(features, seed=1).to(dtype)
    delta = normal(5, features, seed=2).to(dtype) if has_delta else None
    expected_x = x.clone()
    expected = RMSNorm(weight, 1e-5)(expected_x, delta)
    out = fused.add_rms_norm(x, delta, weight.float(), 1e-5, dtype)
    torch.testing.assert_close(x, expected_x, rtol=1e-6, atol=1e-6)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("num_heads", "dim"), [(5, 8), (8, 64), (1, 24)])
def test_a_rotation_is_that_of_the_layers_and_leaves_the_values_alone(
    num_heads: int, dim: int
) -> None:
    rows = normal(7, num_heads + 2, dim)
    expected = rows.clone()
    positions = torch.tensor([0, 1, 5, 100, 3, 2, 9])
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = Rotary(frequencies, torch.float32).angles(positions)
    angles.rotate_(expected[:, :num_heads])
    turned = positions[:, None] * frequencies
    fused.rotate_(rows[:, :num_heads], turned.cos(), turned.sin())
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[:, num_heads:], expected[:, num_heads:])


@pytest.mark.parametrize("features", [64, 1024, 1500])
def test_swiglu_is_that_of_the_layers(features: int) -> None:
    gate_up = normal(3, 2 * features)
    expected = swiglu_of_layers(gate_up.clone())
    torch.testing.assert_close(fused.swiglu(gate_up), expected, rtol=1e-5, atol=1e-6)
