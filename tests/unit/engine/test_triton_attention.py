"""The Triton kernels, in Triton's interpreter, equal the reference and stay in their blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_cases import LAYER, Case, interpreted_or_skip, make_case

from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout

triton_paged = interpreted_or_skip("engine.attention.triton_paged")


def attend(case: Case, num_processors: int = 8) -> torch.Tensor:
    attention = triton_paged.TritonPagedAttention(
        case.layout, case.kv, case.num_heads, case.windows, num_processors=num_processors
    )
    return attention.begin(case.batch)(LAYER, case.query, case.key_value)


def check(case: Case, *, num_processors: int = 8, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Output and pool are the reference's."""
    own_kv = case.kv.clone()
    expected = case.expected()
    expected_kv, case.kv = case.kv, own_kv
    out = attend(case, num_processors)
    assert torch.equal(case.kv, expected_kv)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


spans = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 70), st.just(1)),
        st.tuples(st.integers(0, 40), st.integers(2, 40)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(
    spans=spans,
    seed=st.integers(0, 1000),
    block_size=st.sampled_from([1, 3, 4, 16]),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([8, 16, 24]),
    window=st.one_of(st.none(), st.integers(1, 80)),
)
def test_any_mixture_over_any_tables_equals_the_reference(
    spans: list[tuple[int, int]],
    seed: int,
    block_size: int,
    group: int,
    head_dim: int,
    window: int | None,
) -> None:
    check(
        make_case(
            spans,
            seed=seed,
            block_size=block_size,
            group=group,
            head_dim=head_dim,
            window=window,
        )
    )


@pytest.mark.parametrize("window", [None, 1, 300, 700])
@pytest.mark.parametrize("num_processors", [1, 4, 40])
def test_a_context_split_over_programs_equals_the_reference(
    num_processors: int, window: int | None
) -> None:
    case = make_case([(1100, 1), (5, 1)], block_size=16, window=window)
    check(case, num_processors=num_processors)


def test_few_contexts_are_split_and_many_are_not() -> None:
    case = make_case([(0, 1)])
    attention = triton_paged.TritonPagedAttention(
        case.layout, case.kv, case.num_heads, num_processors=132
    )
    assert attention.num_splits(1, 100_000) == 64
    assert attention.num_splits(1, 1000) == 4  # none shorter than 256 tokens
    assert attention.num_splits(16, 100_000) == 8  # 2 × 132 programs over 16 × 2 heads are 9
    assert attention.num_splits(256, 100_000) == 1


@pytest.mark.parametrize("group", [1, 4, 7])
def test_a_chunk_behind_a_long_context_equals_the_reference(group: int) -> None:
    check(make_case([(150, 90)], block_size=16, group=group))


def test_bfloat16_stays_within_its_rounding() -> None:
    case = make_case(
        [(300, 1), (31, 1), (20, 40), (0, 16)], dtype="bfloat16", block_size=16, head_dim=16
    )
    own_kv = case.kv.clone()
    exact = case.expected().float()
    case.kv = own_kv
    out = attend(case).float()
    assert (out - exact).norm() / exact.norm() < 8e-3


def test_a_rank_reads_and_writes_its_own_heads_alone() -> None:
    whole = make_case([(20, 1), (6, 9)], num_kv_heads=4)
    expected = whole.expected()
    own = make_case([(20, 1), (6, 9)], num_kv_heads=4)
    before = own.kv.clone()
    attention = triton_paged.TritonPagedAttention(own.layout, own.kv, 6, kv_heads=slice(2, 4))
    query, key_value = own.query[:, 6:], own.key_value[:, :, 2:].contiguous()
    out = attention.begin(own.batch)(LAYER, query, key_value)
    torch.testing.assert_close(out, expected[:, 6:], rtol=1e-5, atol=1e-5)
    assert torch.equal(own.kv[:, 2:], whole.kv[:, 2:])
    assert torch.equal(own.kv[:, :2], before[:, :2])


@pytest.mark.parametrize("window", [None, 7])
def test_nothing_outside_a_sequence_context_is_read(window: int | None) -> None:
    case = make_case([(9, 1), (2, 1), (5, 6)], window=window)
    out = attend(case)
    readable = torch.zeros(case.kv.shape[0], 4, dtype=torch.bool)
    for index, span in enumerate(case.batch.spans):
        for token in range(span.num_context):
            readable[case.batch.block_table[index, token // 4], token % 4] = True
    hidden = ~readable[:, None, None, None, :, None].expand(case.kv.shape)
    case.kv[hidden] = math.nan
    assert torch.equal(attend(case), out)


def test_recorded_arrays_are_read_by_every_launch() -> None:
    """As a CUDA graph has it: the arrays change, the step stays the one that was recorded."""
    case = make_case([(30, 1), (9, 1)], block_size=4)
    attention = triton_paged.TritonPagedAttention(case.layout, case.kv, case.num_heads)
    width = case.batch.block_table.shape[1] + 3
    table = torch.zeros(2, width, dtype=torch.int32)
    slots, contexts = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
    step = attention.decodes(slots, table, contexts)
    slots.copy_(case.batch.slot_mapping)
    table[:, : width - 3] = case.batch.block_table
    contexts.copy_(torch.tensor([span.num_context for span in case.batch.spans]))
    out = step(LAYER, case.query, case.key_value)
    torch.testing.assert_close(out, case.expected(), rtol=1e-5, atol=1e-5)


def test_latent_attention_is_refused_in_a_sentence() -> None:
    layout = KvLayout(3, 1, 2, 4, 8, "float32", num_kv_parts=1)
    with pytest.raises(ConfigurationError, match=r"latent attention .* engine\.device: cpu"):
        triton_paged.TritonPagedAttention(layout, torch.zeros(layout.shape), 2)
