"""The steps of a mixture of experts, each by itself."""

from __future__ import annotations

import pytest
import torch

from baton.checkpoint.decoder_parts import MoeConfig
from engine.models.moe import Experts, Router, SparseMlp, combine, dispatch
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
    routing = Router(config(), tensors.linear("gate"))(x)
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
    routing = Router(config(normalizes=normalizes), tensors.linear("gate"))(x)
    best = (x @ tensors["gate.weight"].T).softmax(dim=-1).topk(2).values
    expected = best / best.sum(dim=-1, keepdim=True) if normalizes else best
    torch.testing.assert_close(routing.weights, expected)


def test_router_scores_are_float32_whatever_the_weights_are(tensors: Tensors) -> None:
    gate = Tensors({"block.gate.weight": tensors["gate.weight"].bfloat16()}, "block")
    routing = Router(config(), gate.linear("gate"))(torch.randn(9, HIDDEN).bfloat16())
    assert routing.weights.dtype == torch.float32


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
        routing = Router(config(), tensors.linear("gate"))(x)
        pairs = dispatch(x, routing)
        experts = Experts(config(), tensors.under("experts"))
        whole = experts(pairs, routing.counts)
        half = NUM_EXPERTS // 2
        border = sum(routing.counts[:half])
        lower = experts(pairs[:border], [*routing.counts[:half], *[0] * half])
        upper = experts(pairs[border:], [*[0] * half, *routing.counts[half:]])
        assert torch.equal(combine(torch.cat([lower, upper]), routing), combine(whole, routing))
