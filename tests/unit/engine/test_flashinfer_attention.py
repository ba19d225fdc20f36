"""What FlashInfer is told of a step, read by a stand-in as its documentation has it."""

from __future__ import annotations

import sys

import pytest
import torch
from support import flashinfer_standin
from support.triton_cases import LAYER, interpreted_or_skip, make_case

from baton.kv_layout import KvLayout

triton_paged = interpreted_or_skip("engine.attention.triton_paged")
flashinfer_paged = interpreted_or_skip("engine.attention.flashinfer_paged")


@pytest.mark.parametrize("window", [None, 9, 30])
@pytest.mark.parametrize(
    "spans",
    [[(0, 20)], [(37, 11)], [(16, 16), (3, 2)], [(20, 1), (5, 9), (33, 1), (0, 17)]],
    ids=["alone", "behind a context", "whole blocks", "beside decodes"],
)
def test_a_step_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]], window: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_standin)
    case = make_case(spans, block_size=16, head_dim=64, dtype="bfloat16", window=window)
    own_kv = case.kv.clone()
    exact = case.expected().float()
    expected_kv, case.kv = case.kv, own_kv
    triton = triton_paged.TritonPagedAttention(case.layout, case.kv, case.num_heads, case.windows)
    attention = flashinfer_paged.FlashInferPagedAttention(triton)
    out = attention.begin(case.batch)(LAYER, case.query, case.key_value).float()
    assert torch.equal(case.kv, expected_kv)
    assert (out - exact).norm() / exact.norm() < 8e-3


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (KvLayout(2, 1, 1, 16, 576, "bfloat16", num_kv_parts=1), "latent attention"),
        (KvLayout(2, 1, 1, 16, 64, "float32"), "no KV in float32"),
        (KvLayout(2, 1, 1, 16, 96, "bfloat16"), "heads of 64, 128, 256 elements"),
    ],
    ids=["one part", "float32", "odd heads"],
)
def test_a_layout_that_it_does_not_take_is_refused_by_reason(layout: KvLayout, reason: str) -> None:
    assert reason in flashinfer_paged.refusal(layout)


def test_a_layout_that_it_takes_is_not_refused() -> None:
    assert flashinfer_paged.refusal(KvLayout(2, 8, 32, 16, 128, "bfloat16")) is None
