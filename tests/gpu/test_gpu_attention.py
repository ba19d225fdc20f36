"""The Triton kernels, compiled and run on a GPU, equal the reference on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.triton_cases import LAYER, Case, make_case

from baton.kv_layout import KvDtype
from engine.attention.interface import Attention

MIXED = [(1100, 1), (300, 1), (5, 1), (0, 1), (150, 90), (0, 300), (31, 2)]


def on_gpu(case: Case, *, with_flashinfer: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and pool, on the host."""
    from engine.attention.flashinfer_paged import FlashInferPagedAttention
    from engine.attention.triton_paged import TritonPagedAttention

    kv = case.kv.cuda()
    triton = TritonPagedAttention(case.layout, kv, case.num_heads, case.windows)
    attention: Attention = FlashInferPagedAttention(triton) if with_flashinfer else triton
    out = attention.begin(case.batch)(LAYER, case.query.cuda(), case.key_value.cuda())
    return out.cpu(), kv.cpu()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    exact = expected.double()
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("window", [None, 1, 64, 700])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 8e-3)])
def test_a_step_equals_the_reference(
    dtype: KvDtype, bound: float, head_dim: int, group: int, window: int | None
) -> None:
    case = make_case(
        MIXED, block_size=16, group=group, head_dim=head_dim, dtype=dtype, window=window
    )
    out, kv = on_gpu(case)
    assert relative_error(out, case.expected()) < bound
    assert torch.equal(kv, case.kv)


@pytest.mark.parametrize("seed", range(20))
def test_random_steps_equal_the_reference(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(0, most + 1, (), generator=random))

    spans = [(number(600), 1 + number(1) * number(200)) for _ in range(1 + number(8))]
    case = make_case(
        spans, seed=seed, block_size=1 << number(6), group=1 + number(7), dtype="bfloat16",
        head_dim=64, window=number(1) * number(500) or None,
    )  # fmt: skip
    out, kv = on_gpu(case)
    assert relative_error(out, case.expected()) < 8e-3
    assert torch.equal(kv, case.kv)


@pytest.mark.skipif(
    importlib.util.find_spec("flashinfer") is None, reason="needs the package flashinfer"
)
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flashinfer_equals_the_reference(head_dim: int, window: int | None) -> None:
    case = make_case(
        MIXED, block_size=16, group=4, head_dim=head_dim, dtype="bfloat16", window=window
    )
    out, kv = on_gpu(case, with_flashinfer=True)
    assert relative_error(out, case.expected()) < 8e-3
    assert torch.equal(kv, case.kv)


def test_what_lies_behind_a_context_is_not_read() -> None:
    case = make_case(MIXED, block_size=16, head_dim=64, dtype="bfloat16")
    out, _ = on_gpu(case)
    readable = torch.zeros(case.kv.shape[0], 16, dtype=torch.bool)
    for index, span in enumerate(case.batch.spans):
        tokens = torch.arange(span.num_context)
        readable[case.batch.block_table[index, tokens // 16].long(), tokens % 16] = True
    hidden = ~readable[:, None, None, None, :, None].expand(case.kv.shape)
    case.kv[hidden] = torch.nan
    again, _ = on_gpu(case)
    assert torch.equal(again, out)
