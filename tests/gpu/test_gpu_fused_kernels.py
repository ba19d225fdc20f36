"""What a GPU computes between its products equals what a CPU does."""

from __future__ import annotations

import pytest
import torch

from engine.layers import Linear, RMSNorm, Rotary, swiglu


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("features", [576, 2048, 4096, 5120])
@pytest.mark.parametrize("has_delta", [False, True])
def test_a_norm_is_the_cpus(features: int, has_delta: bool) -> None:
    x, weight = normal(9, features), normal(features).bfloat16()
    delta = normal(9, features).bfloat16() if has_delta else None
    on_gpu = x.cuda()
    out = RMSNorm(weight.cuda(), 1e-5)(on_gpu, None if delta is None else delta.cuda())
    expected = RMSNorm(weight, 1e-5)(x, delta)
    torch.testing.assert_close(on_gpu.cpu(), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-3)


def test_a_rotation_is_the_cpus() -> None:
    rows, positions = normal(33, 48, 128), torch.arange(33) * 100
    frequencies = 1.0 / 500_000 ** (torch.arange(0, 128, 2) / 128)
    on_gpu = rows.cuda()
    angles = Rotary(frequencies.cuda(), torch.float32).angles(positions.cuda())
    angles.rotate_(on_gpu[:, :40])
    Rotary(frequencies, torch.float32).angles(positions).rotate_(rows[:, :40])
    torch.testing.assert_close(on_gpu.cpu(), rows, rtol=1e-3, atol=1e-3)


def test_swiglu_is_the_cpus() -> None:
    gate_up = normal(17, 2 * 8192).bfloat16()
    expected = swiglu(gate_up.float())
    torch.testing.assert_close(swiglu(gate_up.cuda()).cpu().float(), expected, rtol=2e-2, atol=1e-3)


def test_logits_are_not_rounded_to_the_weights_dtype() -> None:
    x, weight = normal(5, 2048).bfloat16(), normal(1000, 2048).bfloat16()
    out = Linear(weight.cuda()).in_float32(x.cuda())
    assert out.dtype == torch.float32
    exact = x.double() @ weight.double().t()
    assert (out.cpu().double() - exact).norm() / exact.norm() < 1e-5
