"""The paged CPU attention equals the reference, for any tables, and stays in its blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cpu_kernels import computing_with
from support.tiny_engine import prompt

from baton.kv_layout import KvDtype, KvLayout
from engine.attention import paged_cpu
from engine.attention.paged_cpu import PagedCpuAttention
from engine.attention.reference import ReferenceAttention
from engine.batch import Batch, build_batch
from engine.native.kernels import Choice
from engine.sequence import Scheduled

LAYER = 1


@pytest.fixture(params=["torch", "native"], autouse=True, scope="module")
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[Choice]:
    with computing_with(request.param):
        yield request.param


@dataclass
class Case:
    """A step of (context, num_tokens) spans over randomly scattered blocks."""

    layout: KvLayout
    kv: torch.Tensor
    batch: Batch
    query: torch.Tensor
    key_value: torch.Tensor
    num_heads: int
    windows: tuple[int | None, ...] = ()
    scale: float | None = None
    value_dim: int = 8


def make_case(
    spans: list[tuple[int, int]],
    *,
    seed: int = 0,
    block_size: int = 4,
    group: int = 3,
    dtype: KvDtype = "float32",
    window: int | None = None,
    is_latent: bool = False,
) -> Case:
    """``is_latent``: one part a token, of which the first 5 elements are the value."""
    random = torch.Generator().manual_seed(seed)
    counts = [-(-(before + new) // block_size) for before, new in spans]
    num_parts = 1 if is_latent else 2
    layout = KvLayout(sum(counts) + 5, 2, 3, block_size, 8, dtype, num_parts)
    free = torch.randperm(layout.num_blocks, generator=random).tolist()
    scheduled = []
    for (before, new), count in zip(spans, counts, strict=True):
        seq = prompt([0] * (before + new))
        if new == 1:  # a decode, behind its prompt
            seq.num_prompt_tokens = before
        seq.num_computed_tokens = before
        seq.block_table = [free.pop() for _ in range(count)]
        scheduled.append(Scheduled(seq, new))
    torch_dtype = getattr(torch, dtype)
    num_heads, num_tokens = 2 * group, sum(new for _, new in spans)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(torch_dtype)

    return Case(
        layout=layout,
        kv=normal(*layout.shape),
        batch=build_batch(scheduled, layout),
        query=normal(num_tokens, num_heads, 8),
        key_value=normal(num_tokens, num_parts, 2, 8),
        num_heads=num_heads,
        windows=() if window is None else (None, window, None),
        scale=0.6 if is_latent else None,
        value_dim=5 if is_latent else 8,
    )


def run_paged(case: Case) -> torch.Tensor:
    attention = PagedCpuAttention(
        case.layout,
        case.kv,
        case.num_heads,
        case.windows,
        scale=case.scale,
        value_dim=case.value_dim,
    )
    return attention.begin(case.batch)(LAYER, case.query, case.key_value)


def run_both(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the paged path and of the reference; both leave the same pool."""
    expected_kv = case.kv.clone()
    reference = ReferenceAttention(
        case.layout, expected_kv, case.windows, scale=case.scale, value_dim=case.value_dim
    )
    expected = reference.begin(case.batch)(LAYER, case.query, case.key_value)
    out = run_paged(case)
    assert torch.equal(case.kv, expected_kv)
    assert out.is_contiguous()
    assert out.shape == (*case.query.shape[:2], case.value_dim)
    return out, expected


spans = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 40), st.just(1)),
        st.tuples(st.integers(0, 20), st.integers(2, 20)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    spans=spans,
    seed=st.integers(0, 1000),
    block_size=st.integers(1, 5),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 45)),
    is_latent=st.booleans(),
)
def test_any_mixture_over_any_tables_equals_the_reference(
    spans: list[tuple[int, int]],
    seed: int,
    block_size: int,
    group: int,
    window: int | None,
    is_latent: bool,
) -> None:
    case = make_case(
        spans,
        seed=seed,
        block_size=block_size,
        group=group,
        window=window,
        is_latent=is_latent,
    )
    out, expected = run_both(case)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("window", [None, 1, 17, 150])
@pytest.mark.parametrize(("before", "new"), [(0, 300), (37, 300), (130, 129), (5, 128)])
def test_a_chunk_of_several_products_equals_the_reference(
    before: int, new: int, window: int | None, is_latent: bool
) -> None:
    case = make_case([(before, new)], block_size=16, window=window, is_latent=is_latent)
    out, expected = run_both(case)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_contexts_of_very_different_lengths_are_split_and_equal_the_reference() -> None:
    case = make_case([(5, 1), (250, 1), (7, 1), (230, 1), (90, 1)])
    assert paged_cpu._alike_in_length(case.batch, 4) == [(0, 2), (2, 5)]
    out, expected = run_both(case)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_within_its_rounding() -> None:
    case = make_case([(100, 1), (31, 1), (20, 40), (0, 16)], dtype="bfloat16", block_size=16)
    out, expected = run_both(case)
    exact = expected.float()
    assert (out.float() - exact).norm() / exact.norm() < 8e-3


def test_a_value_is_the_beginning_of_its_key_where_a_token_has_one_part() -> None:
    """The newest token has the mean of the context's values where all scores are equal."""
    case = make_case([(20, 1)], is_latent=True)
    case.query.zero_()
    out = run_paged(case)
    keys = case.kv[case.batch.block_table[0].long(), :, LAYER, 0]
    values = keys.transpose(1, 2).reshape(-1, 2, 8)[:21, :, :5]
    expected = values.mean(0).repeat_interleave(3, dim=0)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("visible", [1, 7, 8, 9])
def test_the_reference_sees_a_window_and_no_more(visible: int) -> None:
    """The newest token has the visible values' mean where all scores are equal."""
    case = make_case([(20, 1)], window=visible)
    case.query.zero_()
    reference = ReferenceAttention(case.layout, case.kv, case.windows).begin(case.batch)
    out = reference(LAYER, case.query, case.key_value)
    blocks = case.kv[case.batch.block_table[0].long(), :, LAYER, 1]
    values = blocks.transpose(1, 2).reshape(-1, 2, 8)[21 - visible : 21]
    expected = values.double().mean(0).repeat_interleave(3, dim=0)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_only_the_blocks_that_a_window_reaches_are_gathered(
    monkeypatch: pytest.MonkeyPatch, cpu_kernels: Choice
) -> None:
    case = make_case([(90, 1), (60, 9)], window=10)
    gathered: list[int] = []
    gather = PagedCpuAttention.gather

    def watched(
        self: PagedCpuAttention, rows: torch.Tensor, num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gathered.append(len(rows) // (2 * case.layout.num_kv_heads))
        return gather(self, rows, num_pairs)

    monkeypatch.setattr(PagedCpuAttention, "gather", watched)
    run_paged(case)
    # Tokens 81 to 90 of the one, 51 to 68 of the other, in blocks of 4. The kernels gather
    # nothing for a decode.
    assert gathered == ([6] if cpu_kernels == "native" else [3, 6])


def test_sharp_scores_are_exact_with_the_scale_applied_once() -> None:
    case = make_case([(33, 1), (12, 9)])
    case.query *= 20
    out, expected = run_both(case)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_only_the_slots_of_the_step_and_layer_are_written() -> None:
    case = make_case([(6, 1), (3, 7)])
    before = case.kv.clone()
    run_both(case)
    changed = (case.kv != before).any(dim=-1).nonzero().tolist()
    slots = {divmod(slot, 4) for slot in case.batch.slot_mapping.tolist()}
    expected = {
        (block, head, LAYER, kv, offset)
        for block, offset in slots
        for head in range(2)
        for kv in range(2)
    }
    assert {tuple(place) for place in changed} == expected


def test_nothing_outside_a_sequence_context_is_read() -> None:
    case = make_case([(9, 1), (2, 1), (5, 6)])
    out, _ = run_both(case)
    readable = torch.zeros(case.kv.shape[0], 4, dtype=torch.bool)
    for index, span in enumerate(case.batch.spans):
        for token in range(span.num_context):
            readable[case.batch.block_table[index, token // 4], token % 4] = True
    hidden = ~readable[:, None, None, None, :, None].expand(case.kv.shape)
    case.kv[hidden] = 1e30
    assert torch.equal(run_paged(case), out)


def test_a_neighbour_full_of_nan_does_not_spread() -> None:
    case = make_case([(9, 1), (2, 1), (3, 1)])
    case.kv[case.batch.block_table[0]] = math.nan
    case.kv[case.layout.scratch_block] = math.nan
    out = run_paged(case)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()
