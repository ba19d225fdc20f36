"""What changes logits: the exact distribution by definition, and a state made of tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cpu_kernels import computing_with
from support.exact_sampling import distribution, edited, greedy
from support.tiny_engine import prompt
from torch.utils._python_dispatch import TorchDispatchMode

from engine.logits import Logits
from engine.native.kernels import kernels
from engine.sampling.params import SamplingParams
from engine.sampling.processors import KINDS, Processors, apply_all
from engine.sampling.sampler import sample
from engine.sequence import Sequence

VOCABULARY = 20
PROMPT = [3, 5, 5, 7, 11]
EMITTED = [2, 3, 2, 9, 2]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.8},
    "low repetition": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": ((4, 2.0), (9, -3.0), (19, 1.0))},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": (1, 8)},
    "min_tokens reached": {"min_tokens": 5, "stop_token_ids": (1, 8)},
    "limits together": {"min_p": 0.1, "top_k": 9, "top_p": 0.9, "temperature": 1.3},
    "all": {
        "temperature": 0.8,
        "min_p": 0.05,
        "top_k": 12,
        "top_p": 0.95,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": ((4, 1.0), (2, 1.5)),
        "min_tokens": 9,
        "stop_token_ids": (8,),
    },
}


@pytest.fixture(scope="module", params=["torch", "native"], autouse=True)
def _drawing(request: pytest.FixtureRequest) -> Iterator[None]:
    with computing_with(request.param):
        yield


def spread_logits() -> torch.Tensor:
    """Distinct and of both signs, in some order."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    return torch.linspace(-1.6, 1.4, VOCABULARY)[order]


def sequence(
    params: SamplingParams, emitted: list[int] | None = None, before: list[int] | None = None
) -> Sequence:
    seq = prompt(PROMPT if before is None else before, params)
    seq.token_ids += EMITTED if emitted is None else emitted
    return seq


def draw_one(logits: torch.Tensor, seq: Sequence) -> int:
    return sample(Logits(logits[None].clone()), [seq])[0].token_id


@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_thousand_draws_fit_the_exact_distribution(name: str) -> None:
    logits, num_draws, batch = spread_logits(), 20_000, 1000
    counts = torch.zeros(VOCABULARY, dtype=torch.int64)
    shared = Processors(SamplingParams(seed=0, **SETTINGS[name]), PROMPT)
    for first in range(0, num_draws, batch):
        seqs = [sequence(SamplingParams(seed=first + at, **SETTINGS[name])) for at in range(batch)]
        for seq in seqs:
            seq.processors = shared  # of equal tokens, and quicker than 20,000 of them
        drawn = sample(Logits(logits.repeat(batch, 1)), seqs)
        counts += torch.bincount(
            torch.tensor([one.token_id for one in drawn]), minlength=VOCABULARY
        )
    params = SamplingParams(seed=0, **SETTINGS[name])
    exact = distribution(logits.tolist(), params, PROMPT, EMITTED)
    probabilities = torch.tensor(exact, dtype=torch.float64)
    possible = probabilities > 0
    assert 1 < possible.sum() <= VOCABULARY
    assert not counts[~possible].any()
    expected = probabilities[possible] * num_draws
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    degrees = (possible.sum() - 1).double()
    # The chi-square distribution's upper tail is the regularized gamma function.
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-3


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.5, 2),
    min_tokens=st.integers(0, 8),
)
def test_greedy_draws_are_those_of_the_definition(
    data: st.DataObject, presence: float, frequency: float, repetition: float, min_tokens: int
) -> None:
    tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
    before, emitted = data.draw(tokens), data.draw(tokens)
    bias = data.draw(st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-3, 3)))
    params = SamplingParams(
        seed=1,
        temperature=0.0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
        min_tokens=min_tokens,
        stop_token_ids=(0, 6),
    )
    torch.manual_seed(len(before))
    logits = torch.randn(VOCABULARY)
    row = edited(logits.tolist(), params, before, emitted)
    drawn = draw_one(logits, sequence(params, emitted, before))
    # In float32 two that are closer than its rounding may change places.
    assert drawn == greedy(logits.tolist(), params, before, emitted) or row[drawn] > max(row) - 1e-5


def test_order_is_bias_then_penalties() -> None:
    params = SamplingParams(seed=0, temperature=0.0, repetition_penalty=2.0, logit_bias=((5, 3.0),))
    logits = torch.zeros(VOCABULARY)
    logits[5], logits[6] = 1.0, 2.4
    # (1 + 3) / 2 is below 2.4; 1 / 2 + 3 would not be.
    assert draw_one(logits, sequence(params)) == 6


def changed(logits: torch.Tensor, processors: Processors, token_ids: list[int]) -> torch.Tensor:
    row = logits[None].clone()
    apply_all(row, [(0, processors.at(token_ids))])
    return row[0]


@settings(max_examples=50, deadline=None)
@given(
    before=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    emitted=st.lists(st.integers(0, VOCABULARY - 1), max_size=200),
    name=st.sampled_from(["frequency", "repetition", "min_tokens", "bias", "all"]),
)
def test_state_that_follows_the_tokens_equals_one_made_anew_from_them(
    before: list[int], emitted: list[int], name: str
) -> None:
    params, logits = SamplingParams(seed=0, **SETTINGS[name]), spread_logits()
    following = Processors(params, before)
    for number in range(0, len(emitted) + 1, 7):
        token_ids = before + emitted[:number]
        anew = Processors(params, before)
        assert torch.equal(changed(logits, following, token_ids), changed(logits, anew, token_ids))


def test_more_distinct_tokens_than_there_was_room_for_are_all_penalized() -> None:
    params = SamplingParams(seed=0, presence_penalty=1.0, frequency_penalty=0.25)
    emitted = [token for token in range(400) for _ in range(token % 3 + 1)]
    row = changed(torch.zeros(500), Processors(params, []), emitted)
    expected = [-(1.0 + 0.25 * (token % 3 + 1)) for token in range(400)]
    assert row[:400].tolist() == expected
    assert not row[400:].any()


def test_rows_of_other_sequences_stay_as_they_are() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    every = Processors(SamplingParams(seed=0, **SETTINGS["all"]), PROMPT)
    apply_all(logits, [(2, every.at(PROMPT + EMITTED))])
    assert torch.equal(logits[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(logits[2], before[2])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_draws_the_same_alone_and_among_fifteen_others(name: str) -> None:
    logits = torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    everyone = [SamplingParams(seed=at, **kind) for at, kind in enumerate(SETTINGS.values())]
    everyone += [replace(everyone[-1], temperature=0.0)] * (16 - len(everyone))
    params = SamplingParams(seed=77, **SETTINGS[name])
    for row in range(16):
        mixed = [sequence(each) for each in everyone]
        mixed[row] = sequence(params)
        alone = draw_one(logits[row], sequence(params))
        assert sample(Logits(logits.clone()), mixed)[row].token_id == alone


def test_every_kind_is_used_by_some_setting() -> None:
    processors = Processors(SamplingParams(seed=0, **SETTINGS["all"]), PROMPT)
    assert list(processors.at(PROMPT)) == list(KINDS)
    assert Processors(SamplingParams(seed=0), PROMPT).at(PROMPT) == {}


def test_a_changed_row_is_not_drawn_by_the_highest_logits_that_the_model_told() -> None:
    logits = torch.zeros(2, 64)
    logits[:, 40] = 3.0
    highest = logits.view(2, 2, 32).amax(dim=-1)
    biased = SamplingParams(seed=0, temperature=0.0, logit_bias=((40, -5.0), (7, 1.0)))
    seqs = [prompt(PROMPT, biased), prompt(PROMPT, SamplingParams(seed=0, temperature=0.0))]
    assert [one.token_id for one in sample(Logits(logits, highest), seqs)] == [7, 40]


class _Passes(TorchDispatchMode):
    """Names the operations that read or write something as large as the logits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self._size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
        if any(each.numel() >= self._size for each in tensors):
            self.names.append(func.overloadpacket.__name__)
        return result


def test_greedy_rows_cost_one_pass_over_the_logits() -> None:
    logits = torch.randn(32, 1000, generator=torch.Generator().manual_seed(4))
    seqs = [prompt(PROMPT, SamplingParams(seed=0, temperature=0.0)) for _ in range(32)]
    with _Passes(logits.numel()) as passes:
        sample(Logits(logits), seqs)
    assert passes.names == (["argmax"] if kernels() is None else [])
