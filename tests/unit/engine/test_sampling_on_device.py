"""A draw that is begun on a device and told later is the draw of the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_engine import prompt

from engine.logits import Logits
from engine.sampling import on_device
from engine.sampling.draw import draw
from engine.sampling.on_device import DeviceDraw, begin_sample
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import sample
from engine.sequence import Sequence

VOCABULARY = 400

some_params = st.builds(
    SamplingParams,
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.0, 1e-31, 0.5, 1.0, 30.0]),
    top_k=st.sampled_from([0, 1, 5, 300, 500]),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
)


def some_logits(rows: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, VOCABULARY, generator=random)


@settings(max_examples=80, deadline=None)
@given(params=st.lists(some_params, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_any_rows_draw_the_tokens_of_the_host(params: list[SamplingParams], seed: int) -> None:
    logits = some_logits(len(params), seed)
    logits[:, 7] = logits[:, 300] = logits.amax(dim=-1)  # equals
    positions = list(range(len(params)))
    expected = draw(Logits(logits), params, positions)
    assert DeviceDraw(logits, params, positions).wait() == expected


@pytest.mark.parametrize("top_p", [0.9, 0.1])
def test_a_support_beyond_what_was_sorted_is_told_all_the_same(top_p: float) -> None:
    """Of nearly equal tokens 90% are 360, of which 256 are sorted at first."""
    logits = some_logits(8, 3, scale=0.01)
    params = [SamplingParams(seed=n, top_p=top_p) for n in range(8)]
    expected = draw(Logits(logits), params, [0] * 8)
    begun = DeviceDraw(logits, params, [0] * 8)
    assert begun._told.wait()[-1] == (top_p == 0.9), "a second look is for those alone"
    assert begun.wait() == expected


def test_no_rows_draw_no_tokens() -> None:
    assert DeviceDraw(torch.empty(0, VOCABULARY), [], []).wait() == []


def test_sequences_get_what_the_host_samples_with_processors_and_log_probabilities() -> None:
    asked = [
        SamplingParams(seed=1, temperature=0.8, num_logprobs=2),
        SamplingParams(seed=2, temperature=0.0, logit_bias=((11, 90.0),)),
        SamplingParams(seed=3, temperature=0.9, repetition_penalty=1.8, frequency_penalty=1.0),
        SamplingParams(seed=4, temperature=1.0, min_tokens=5, stop_token_ids=(3, 4)),
    ]

    def sequences() -> list[Sequence]:
        seqs = [prompt([5, 6, 7], params) for params in asked]
        for seq in seqs:
            seq.token_ids += [8, 9]
        return seqs

    expected = sample(Logits(some_logits(4, 5)), sequences())
    told = begin_sample(some_logits(4, 5), sequences()).wait()
    assert [(each.token_id, each.logprobs) for each in told] == [
        (each.token_id, each.logprobs) for each in expected
    ]
    assert told[1].token_id == 11


def test_the_ids_come_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    to_host = on_device._ToHost

    def counted(numbers: torch.Tensor) -> on_device._ToHost:
        copies.append(len(numbers))
        return to_host(numbers)

    monkeypatch.setattr(on_device, "_ToHost", counted)
    params = [SamplingParams(seed=n, top_k=5 * n, temperature=0.3 * n) for n in range(6)]
    DeviceDraw(some_logits(6, 1), params, [0] * 6).wait()
    assert copies == [7]
