"""The steps of a mixture of experts, each by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from baton.checkpoint.decoder_parts import MoeConfig
from engine.models.moe import Experts, SparseMlp, combine, dispatch
from engine.models.router import Router, Routing
from engine.models.tensors import Tensors

NUM_EXPERTS, HIDDEN, INNER = 6, 8, 12


def config(*, normalizes: bool = True, num_chosen: int = 2) -> MoeConfig:
    return MoeConfig(NUM_EXPERTS, num_chosen, INNER, normalizes)


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(0)
    named = {"block.gate.weight": torch.randn(NUM_EXPERTS, HIDDEN)}
    for expert in range(NUM_EXPERTS):
        for name, shape in (
            ("gate_proj", (INNER, HIDDEN)),
            ("up_proj", (INNER, HIDDEN)),
            ("down_proj", (HIDDEN, INNER)),
        ):
            named[f"block.experts.{expert}.{name}.weight"] = torch.randn(shape)
    return Tensors(named, "block")


def test_pairs_are_grouped_by_expert_and_keep_their_order(tensors: Tensors) -> None:
    x = torch.randn(20, HIDDEN)
    routing = Router(config(), tensors)(x)
    scores = (x @ tensors["gate.weight"].T).softmax(dim=-1)
    chosen = scores.topk(2).indices
    assert sum(routing.counts) == 40
    first = 0
    for expert, count in enumerate(routing.counts):
        pairs = routing.order[first : first + count]
        assert pairs.tolist() == (chosen.view(-1) == expert).nonzero()[:, 0].tolist()
        assert torch.equal(dispatch(x, routing)[first : first + count], x[pairs // 2])
        first += count


@pytest.mark.parametrize("normalizes", [True, False])
def test_weights_are_those_of_all_experts_or_sum_to_one(tensors: Tensors, normalizes: bool) -> None:
    x = torch.randn(9, HIDDEN)
    routing = Router(config(normalizes=normalizes), tensors)(x)
    best = (x @ tensors["gate.weight"].T).softmax(dim=-1).topk(2).values
    expected = best / best.sum(dim=-1, keepdim=True) if normalizes else best
    torch.testing.assert_close(routing.weights, expected)


def test_router_scores_are_float32_whatever_the_weights_are(tensors: Tensors) -> None:
    gate = Tensors({"block.gate.weight": tensors["gate.weight"].bfloat16()}, "block")
    routing = Router(config(), gate)(torch.randn(9, HIDDEN).bfloat16())
    assert routing.weights.dtype == torch.float32


def routed(config: MoeConfig, scores: list[float], bias: list[float] | None = None) -> Routing:
    """Of one token whose router gives these outputs."""
    named = {"block.gate.weight": torch.tensor(scores)[:, None]}
    if bias is not None:
        named["block.gate.e_score_correction_bias"] = torch.tensor(bias)
    return Router(config, Tensors(named, "block"))(torch.ones(1, 1))


def chosen(routing: Routing) -> set[int]:
    return {expert for expert, count in enumerate(routing.counts) if count}


def grouped(**changes: Any) -> MoeConfig:
    """Two experts of six, in three groups of two."""
    return replace(config(), num_groups=3, num_chosen_groups=1, **changes)


def test_experts_outside_the_best_groups_are_not_chosen() -> None:
    scores = [3.0, -3.0, 2.0, 1.9, 2.5, 2.4]
    assert chosen(routed(config(), scores)) == {0, 4}
    assert chosen(routed(grouped(), scores)) == {0, 1}  # by the best of a group
    assert chosen(routed(grouped(num_summed=2), scores)) == {4, 5}  # by the sum of two
    two = replace(grouped(num_summed=2), num_chosen_groups=2, num_experts_per_token=4)
    assert chosen(routed(two, scores)) == {0, 1, 4, 5}


def test_a_bias_chooses_and_does_not_weigh() -> None:
    scores, bias = [3.0, 2.0, 1.0, 0.0, -1.0, -2.0], [0.0, 0.0, 0.0, 0.0, 9.0, 5.0]
    biased = replace(config(normalizes=False), scoring="sigmoid", has_choice_bias=True)
    routing = routed(biased, scores, bias)
    assert chosen(routing) == {4, 5}
    torch.testing.assert_close(routing.weights, torch.tensor([[-1.0, -2.0]]).sigmoid())
    in_groups = routed(replace(biased, num_groups=3, num_chosen_groups=1), scores, bias)
    torch.testing.assert_close(in_groups.weights, routing.weights)


@pytest.mark.parametrize("normalizes", [True, False])
def test_weights_are_scaled_after_they_are_normalized(normalizes: bool) -> None:
    scores = [1.0, 0.5, -1.0, -1.0, -1.0, -1.0]
    routing = routed(replace(config(normalizes=normalizes), weights_scale=2.5), scores)
    best = torch.tensor([scores]).softmax(dim=-1)[:, :2]
    expected = 2.5 * (best / best.sum() if normalizes else best)
    torch.testing.assert_close(routing.weights, expected)


def test_sigmoids_that_are_all_zero_give_weights_of_zero() -> None:
    routing = routed(replace(config(), scoring="sigmoid"), [-1e4] * 6)
    assert routing.weights.tolist() == [[0.0, 0.0]]


def test_every_token_goes_through_the_shared_experts_with_weight_one(tensors: Tensors) -> None:
    names = {"gate_proj": (5, HIDDEN), "up_proj": (5, HIDDEN), "down_proj": (HIDDEN, 5)}
    shared = {name: torch.randn(shape) for name, shape in names.items()}
    named = {f"block.shared_experts.{name}.weight": value for name, value in shared.items()}
    both = Tensors({**tensors._tensors, **named}, "block")
    x = torch.randn(7, HIDDEN)
    inner = torch.nn.functional.silu(x @ shared["gate_proj"].T) * (x @ shared["up_proj"].T)
    with torch.inference_mode():
        alone = SparseMlp(config(), both)(x)
        out = SparseMlp(replace(config(), shared_intermediate_size=5), both)(x)
    torch.testing.assert_close(out - alone, inner @ shared["down_proj"].T, rtol=1e-4, atol=1e-4)


def test_a_rank_without_tokens_chooses_among_groups_all_the_same(tensors: Tensors) -> None:
    routing = Router(grouped(), tensors)(torch.empty(0, HIDDEN))
    assert routing.counts == [0] * NUM_EXPERTS
    assert routing.weights.shape == (0, 2)


@pytest.mark.parametrize("num_chosen", [1, 2, 6])
def test_the_block_adds_each_tokens_experts_by_weight(tensors: Tensors, num_chosen: int) -> None:
    x = torch.randn(7, HIDDEN)
    block = SparseMlp(config(num_chosen=num_chosen), tensors)
    scores = (x @ tensors["gate.weight"].T).softmax(dim=-1)
    weights, chosen = scores.topk(num_chosen)
    expected = torch.zeros(7, HIDDEN)
    for token in range(7):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            mine = tensors.under(f"experts.{expert}")
            gate = torch.nn.functional.silu(mine["gate_proj.weight"] @ x[token])
            inner = gate * (mine["up_proj.weight"] @ x[token])
            expected[token] += weight / weights[token].sum() * (mine["down_proj.weight"] @ inner)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_experts_without_tokens_compute_nothing(tensors: Tensors) -> None:
    experts = Experts(config(), tensors.under("experts"))
    called: list[int] = []

    def watched(expert: int) -> object:
        return lambda pairs: called.append(expert) or torch.zeros_like(pairs)

    experts._mlps = [watched(expert) for expert in range(NUM_EXPERTS)]  # type: ignore[misc]
    experts(torch.randn(5, HIDDEN), [0, 3, 0, 0, 2, 0])
    assert called == [1, 4]


def test_experts_on_two_ranks_give_the_same(tensors: Tensors) -> None:
    """What expert parallelism does around them: slices of the pairs, by the counts."""
    x = torch.randn(30, HIDDEN)
    with torch.inference_mode():
        routing = Router(config(), tensors)(x)
        pairs = dispatch(x, routing)
        experts = Experts(config(), tensors.under("experts"))
        whole = experts(pairs, routing.counts)
        half = NUM_EXPERTS // 2
        border = sum(routing.counts[:half])
        lower = experts(pairs[:border], [*routing.counts[:half], *[0] * half])
        upper = experts(pairs[border:], [*[0] * half, *routing.counts[half:]])
        assert torch.equal(combine(torch.cat([lower, upper]), routing), combine(whole, routing))
