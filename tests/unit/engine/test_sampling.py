"""Tokens are drawn from the exact distribution, as a pure function of their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cpu_kernels import computing_with

from engine.logits import Logits
from engine.sampling import draw as draw_module
from engine.sampling.draw import draw, uniform
from engine.sampling.params import SamplingParams

# By degrees of freedom, what a chi-square statistic exceeds with a probability of 1e-4.
CHI_SQUARE_LIMIT = {8: 31.83, 19: 50.80}

# A change of this would make repeated attempts of running requests differ.
UNIFORM_OF_SEED_1_CHOICE_2_POSITION_3 = 0.4371195899783443


@pytest.fixture(scope="module", params=["torch", "native"], autouse=True)
def _drawing(request: pytest.FixtureRequest) -> Iterator[None]:
    with computing_with(request.param):
        yield


def shuffled(low: float, high: float, size: int) -> torch.Tensor:
    """Distinct, evenly spread logits in some order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return torch.linspace(low, high, size)[order]


def draw_many(row: torch.Tensor, params: SamplingParams, num_draws: int) -> torch.Tensor:
    """Counts per token of draws at positions 0, 1, 2..."""
    counts = torch.zeros(row.shape[0], dtype=torch.int64)
    for first in range(0, num_draws, 1000):
        positions = list(range(first, first + 1000))
        drawn = draw(Logits(row.expand(1000, -1)), [params] * 1000, positions)
        counts += torch.bincount(torch.tensor(drawn), minlength=row.shape[0])
    return counts


def assert_fits(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARE_LIMIT[int(possible.sum()) - 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = shuffled(-1.0, 1.0, 20)
    counts = draw_many(logits, SamplingParams(seed=3, temperature=temperature), 20_000)
    assert_fits(counts, (logits.double() / temperature).softmax(0))


def test_draws_under_both_limits_follow_the_distribution_that_is_left() -> None:
    logits = shuffled(0.0, 3.0, 40)
    likeliest = logits.argsort(descending=True)
    kept = logits.double().softmax(0)
    kept[likeliest[15:]] = 0
    kept /= kept.sum()
    reached = kept[likeliest].cumsum(0)
    num_kept = int((reached < 0.7).sum()) + 1
    kept[likeliest[num_kept:]] = 0
    assert num_kept == 9
    params = SamplingParams(seed=5, temperature=1.0, top_k=15, top_p=0.7)
    assert_fits(draw_many(logits, params, 20_000), kept / kept.sum())


def support(row: torch.Tensor, params: SamplingParams) -> set[int]:
    """The tokens that some uniform number leads to, by the definition."""
    order = sorted(range(len(row)), key=lambda token: (-row[token].item(), token))
    shares = ((row - row.max()).double() / params.temperature).exp()
    order = [token for token in order if shares[token] >= params.min_p]
    order = order[: params.top_k or len(order)]
    weights = (row[order].double() / params.temperature).softmax(0)
    kept, reached = [], 0.0
    for token, weight in zip(order, weights.tolist(), strict=True):
        if kept and params.top_p < 1 and reached >= params.top_p - 1e-9:
            break
        kept.append(token)
        reached += weight
    return set(kept)


def reachable(
    row: torch.Tensor, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> set[int]:
    """The tokens that a fine grid of uniform numbers leads to."""
    grid = [(i + 0.5) / 3000 for i in range(3000)]
    monkeypatch.setattr(draw_module, "uniform", lambda _, position: grid[position])
    return set(draw(Logits(row.expand(3000, -1)), [params] * 3000, list(range(3000))))


@pytest.mark.parametrize("num_candidates", [4, 256])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1.0, 0.0),
        (3, 1.0, 0.0),
        (7, 1.0, 0.0),
        (0, 0.3, 0.0),
        (0, 0.9, 0.0),
        (9, 0.6, 0.0),
        (0, 1e-9, 0.0),
        (0, 1.0, 0.5),
        (0, 1.0, 1.0),
        (3, 1.0, 0.4),
        (9, 0.8, 0.4),
        (0, 0.9, 0.3),
    ],
)
def test_support_is_exact_with_and_without_ties(
    monkeypatch: pytest.MonkeyPatch, num_candidates: int, top_k: int, top_p: float, min_p: float
) -> None:
    monkeypatch.setattr(draw_module, "NUM_CANDIDATES", num_candidates)
    params = SamplingParams(seed=1, temperature=1.3, top_k=top_k, top_p=top_p, min_p=min_p)
    distinct = shuffled(0.0, 2.5, 24)
    tied = (distinct * 2).round() / 2
    for row in (distinct, tied, torch.zeros(24)):
        assert reachable(row, params, monkeypatch) == support(row, params)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=11, temperature=0.0),
        SamplingParams(seed=11, temperature=0.9),
        SamplingParams(seed=11, temperature=0.9, top_p=0.8),
        SamplingParams(seed=11, temperature=1.2, top_k=40),
        SamplingParams(seed=11, temperature=3.0, top_p=0.99),
        SamplingParams(seed=11, temperature=2.0, min_p=0.1),
    ],
    ids=str,
)
def test_a_row_draws_the_same_alone_and_among_fifteen_others(params: SamplingParams) -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 5000) * 3
    others = [
        replace(
            params,
            seed=i,
            temperature=i % 3 * 0.5,
            top_k=i % 4,
            top_p=1 - i % 5 * 0.1,
            min_p=i % 7 * 0.05,
        )
        for i in range(16)
    ]
    for row in range(16):
        mixed = [*others[:row], params, *others[row + 1 :]]
        alone = draw(Logits(logits[row : row + 1]), [params], [41])
        assert draw(Logits(logits), mixed, [41] * 16)[row] == alone[0]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    choice_index=st.integers(0, 100),
    position=st.integers(0, 10**6),
    temperature=st.floats(0.1, 5.0),
)
def test_a_draw_depends_on_seed_choice_and_position_alone(
    seed: int, choice_index: int, position: int, temperature: float
) -> None:
    logits = torch.linspace(-2, 2, 100)[None]
    params = SamplingParams(seed, choice_index, temperature)
    first = draw(Logits(logits), [params], [position])
    draw(Logits(logits), [SamplingParams(seed=0)], [0])
    assert draw(Logits(logits), [params], [position]) == first


def test_the_uniform_number_is_pinned_and_varies_with_each_part_of_the_place() -> None:
    params = SamplingParams(seed=2**64 - 1, choice_index=3)
    others = [
        uniform(params, 6),
        uniform(replace(params, choice_index=4), 5),
        uniform(replace(params, seed=1), 5),
        uniform(replace(params, seed=5, choice_index=3), 2**40),
    ]
    assert len({uniform(params, 5), *others}) == 5
    assert all(0 <= number < 1 for number in others)
    pinned = uniform(SamplingParams(seed=1, choice_index=2), 3)
    assert pinned == UNIFORM_OF_SEED_1_CHOICE_2_POSITION_3


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert draw(Logits(logits), [SamplingParams(0, temperature=0.0)] * 2, [0, 0]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_equals_argmax(temperature: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(20, 300) * 4
    params = [SamplingParams(seed, temperature=temperature) for seed in range(20)]
    assert draw(Logits(logits), params, [0] * 20) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53, 0.5])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(
    monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    monkeypatch.setattr(draw_module, "uniform", lambda *_: number)
    logits = torch.tensor([[-math.inf, 0.3, -math.inf, 0.1, -math.inf]])
    for params in (SamplingParams(0), SamplingParams(0, top_k=2), SamplingParams(0, top_p=0.999)):
        expected = 3 if number > 0.9 else 1
        assert draw(Logits(logits), [params], [0]) == [expected]


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 50)
    drawn = SamplingParams(seed=9, temperature=1.0)
    greedy = SamplingParams(seed=9, temperature=0.0)
    mixed = draw(Logits(logits), [greedy, drawn, greedy], [4, 4, 4])
    assert [mixed[0], mixed[2]] == logits[[0, 2]].argmax(-1).tolist()
    assert [mixed[1]] == draw(Logits(logits[1:2]), [drawn], [4])


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("share_of_zeros", [0.0, 0.5, 0.99])
def test_blocks_invert_to_the_column_that_running_sums_invert_to(
    size: int, share_of_zeros: float
) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = torch.randint(1, 100, (64, size), generator=generator).float()  # sums are exact
    weights[torch.rand(weights.shape, generator=generator) < share_of_zeros] = 0.0
    weights[:, size // 2] = 1.0
    target = torch.rand(64, generator=generator, dtype=torch.float64)
    target[0], target[1] = 0.0, 1.0 - 2.0**-53
    reached = weights.double().cumsum(dim=-1)
    expected = torch.searchsorted(reached, target[:, None] * reached[:, -1:], right=True)[:, 0]
    chosen = draw_module.invert(weights, target)
    assert chosen.tolist() == expected.tolist()
    assert bool((weights.gather(1, chosen[:, None]) > 0).all())


def test_rounded_sums_never_lead_out_of_a_block_or_to_an_impossible_token() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(256, 700, generator=generator) ** 20
    weights[:, 500:] = 0.0
    weights[:, 200:300] = 0.0
    target = torch.full((256,), 1.0 - 2.0**-53, dtype=torch.float64)
    chosen = draw_module.invert(weights, target)
    assert bool((chosen < 500).all())
    assert bool((weights.gather(1, chosen[:, None]) > 0).all())


def test_a_support_of_thousands_is_exact_before_all_tokens_are_sorted() -> None:
    logits = shuffled(0.0, 1.0, 20_000)
    params = SamplingParams(seed=4, temperature=1.0, top_p=0.2)
    inside = support(logits, params)
    assert 256 < len(inside) < 256 * 16
    drawn = draw(Logits(logits.expand(500, -1)), [params] * 500, list(range(500)))
    assert set(drawn) <= inside
    below = {token for token in drawn if logits[token] < logits[list(inside)].median()}
    assert below, "nothing of the support's lower half was drawn"
