"""Each layer against its definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support.cpu_kernels import computing_with

from baton.checkpoint.rope_config import RopeConfig
from engine import layers
from engine.layers import Linear, RMSNorm, Rotary, swiglu
from engine.models.rope import rope_frequencies


@pytest.fixture(params=["torch", "native"], autouse=True, scope="module")
def _cpu_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with computing_with(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
def test_linear_equals_the_product(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    packs: bool,
    has_bias: bool,
    num_tokens: int,
) -> None:
    if not packs:
        monkeypatch.setattr(layers, "_can_pack", lambda _: False)
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 80).to(dtype), torch.randn(48).to(dtype)
    x = torch.randn(num_tokens, 80).to(dtype)
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    with torch.inference_mode():
        out = Linear(weight, bias if has_bias else None)(x)
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_in_float32_is_not_rounded_to_bfloat16(has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 80).bfloat16(), torch.randn(48).bfloat16()
    x = torch.randn(9, 80).bfloat16()
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    with torch.inference_mode():
        linear = Linear(weight, bias if has_bias else None)
        out = linear.in_float32(x)
    assert out.dtype == torch.float32
    if linear._is_packed:
        assert (out - exact).norm() / exact.norm() < 1e-5
    assert (out - exact).norm() / exact.norm() < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_its_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 32) * 3, torch.randn(32).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    out = RMSNorm(weight, 0.5)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, (exact * weight.double()).to(dtype))


@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [8, 33, 576])
@pytest.mark.parametrize("rows", [1, 40])
def test_rms_norm_first_adds_what_it_is_given(
    delta_dtype: torch.dtype, features: int, rows: int
) -> None:
    torch.manual_seed(0)
    x, delta = torch.randn(rows, features), torch.randn(rows, features).to(delta_dtype)
    norm = RMSNorm(torch.randn(features).bfloat16(), 1e-5)
    total = x + delta
    expected = norm(total)
    out = norm(x, delta)
    assert torch.equal(x, total)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_rms_norm_of_heads_has_a_weight_for_each() -> None:
    x, weight = torch.randn(5, 3, 8), torch.randn(3, 8)
    out = RMSNorm(weight, 1e-5)(x)
    each = [RMSNorm(weight[head], 1e-5)(x[:, head].contiguous()) for head in range(3)]
    torch.testing.assert_close(out, torch.stack(each, dim=1))


def rotary_of(head_dim: int, theta: float, scale: float = 1.0) -> Rotary:
    frequencies, _ = rope_frequencies(RopeConfig(theta), head_dim)
    return Rotary(frequencies, torch.float32, scale)


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_rotary_rotates_pairs_of_halves_by_position_times_frequency(scale: float) -> None:
    torch.manual_seed(0)
    head_dim, theta = 8, 500.0
    heads = torch.randn(3, 2, head_dim)
    positions = torch.tensor([0, 5, 411])
    rotary = rotary_of(head_dim, theta, scale)
    out = heads.clone()
    rotary.angles(positions).rotate_(out)
    pairs = torch.complex(heads[..., :4].double(), heads[..., 4:].double())
    frequencies = theta ** (-torch.arange(4).double() / 4)
    turned = scale * pairs * torch.exp(1j * positions[:, None, None] * frequencies)
    torch.testing.assert_close(
        out.double(), torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-4, atol=1e-4
    )


def test_rotary_of_a_part_of_a_packed_tensor_leaves_the_rest_alone() -> None:
    packed = torch.randn(4, 6, 8)
    before = packed.clone()
    rotary = rotary_of(8, 100.0)
    rotary.angles(torch.tensor([3, 1, 4, 1])).rotate_(packed[:, :4])
    assert torch.equal(packed[:, 4:], before[:, 4:])
    assert not torch.equal(packed[:, :4], before[:, :4])


def test_swiglu_takes_the_gate_from_the_first_half() -> None:
    gate_up = torch.randn(3, 10)
    torch.testing.assert_close(swiglu(gate_up), F.silu(gate_up[:, :5]) * gate_up[:, 5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 16, 100, 1536])
def test_swiglu_at_any_size(dtype: torch.dtype, features: int) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(21, 2 * features) * 30).to(dtype)
    exact = F.silu(gate_up[:, :features].double()) * gate_up[:, features:].double()
    out = swiglu(gate_up)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=1e-6)
