"""Linear layers of 8- and 4-bit weights, against the weights that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_architectures import VARIANTS, save_variant

from baton.config import parse_config
from baton.errors import ConfigurationError
from engine.quantized import GROUP_SIZE, Quantization, linear
from engine.setup import plan_engine

KINDS: tuple[Quantization, ...] = ("int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)


def weights_of(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Outputs whose weights differ in size and in mean, as those of real layers do."""
    torch.manual_seed(num_outputs + num_inputs)
    sizes = torch.rand(num_outputs, 1) * 3 + 0.1
    return (torch.randn(num_outputs, num_inputs) * sizes + torch.randn(num_outputs, 1)).to(dtype)


def kept(weight: torch.Tensor, kind: Quantization) -> torch.Tensor:
    """[out, in] in float32: what the layer multiplies by, column by column."""
    layer = linear(weight, None, kind)
    return layer(torch.eye(weight.shape[1], dtype=weight.dtype)).float().T


def half_steps(weight: torch.Tensor, kind: Quantization) -> torch.Tensor:
    """How far each weight may be off: half the distance of two neighbouring values."""
    whole = weight.float()
    if kind == "int8":
        return (whole.abs().amax(dim=1, keepdim=True) / 127 / 2).expand(whole.shape)
    groups = whole.view(len(whole), -1, GROUP_SIZE)
    steps = (groups.amax(dim=2) - groups.amin(dim=2)) / 15
    return (steps / 2).repeat_interleave(GROUP_SIZE, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_kept_to_the_nearest_step(kind: Quantization, dtype: torch.dtype) -> None:
    weight = weights_of(128, 96, dtype)
    allowed = half_steps(weight, kind) * 1.001
    if dtype == torch.bfloat16:  # what is kept of scales and zeros, and the product, are rounded
        allowed = allowed + weight.float().abs().amax(dim=1, keepdim=True) * 2**-7
    assert ((kept(weight, kind) - weight.float()).abs() <= allowed + 1e-6).all()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_the_kept_weights_with_the_bias(
    kind: Quantization, dtype: torch.dtype, num_rows: int
) -> None:
    weight, bias = weights_of(64, 160, dtype), torch.randn(64).to(dtype)
    x = torch.randn(num_rows, 160).to(dtype)
    expected = x.float() @ kept(weight, kind).T + bias.float()
    out = linear(weight, bias, kind)(x)
    assert out.dtype == dtype
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("value", [0.0, -1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_all_alike_are_kept(kind: Quantization, value: float) -> None:
    assert torch.equal(kept(torch.full((64, 32), value), kind), torch.full((64, 32), value))


def test_workers_of_any_quantization_pair_and_share_prefixes(tmp_path: Path) -> None:
    """A prefill worker with whole weights serves decode workers with few bits."""
    save_variant(tmp_path / "m", VARIANTS["llama"])
    plans = [
        plan_engine(
            parse_config({"model": str(tmp_path / "m"), "engine": {"quantization": kind}}),
            secret="s",
        )
        for kind in ("none", *KINDS)
    ]
    assert [plan.quantization for plan in plans] == ["none", *KINDS]
    assert len({plan.digest for plan in plans}) == 1
    assert len({plan.domain.root() for plan in plans}) == 1


@pytest.mark.parametrize("shape", [(64, 48), (40, 64)])
def test_what_cannot_be_cut_into_groups_is_refused_with_what_to_do(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError, match="use int8, or fewer ranks"):
        linear(torch.ones(shape), None, "int4")
