"""Log-probabilities are the model's own, whatever the sampling parameters make of its logits."""

from __future__ import annotations

import pytest
import torch
from support.tiny_engine import prompt

from engine.logits import Logits
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import sample

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(5)) * 3


def params(num_logprobs: int | None, seed: int = 0) -> SamplingParams:
    """Everything that changes logits, to show that nothing of it is told."""
    return SamplingParams(
        seed=seed,
        temperature=1.7,
        top_k=20,
        min_p=0.01,
        presence_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias=((3, 5.0), (4, -100.0)),
        min_tokens=9,
        stop_token_ids=(int(LOGITS[0].argmax()),),
        num_logprobs=num_logprobs,
    )


def test_each_row_gets_as_many_as_it_wants_of_the_raw_distribution() -> None:
    wanted = [None, 0, 3, 20, None, 50]
    seqs = [prompt([3, 4, 5], params(number, row)) for row, number in enumerate(wanted)]
    raw = LOGITS.double().log_softmax(-1)
    for row, drawn in enumerate(sample(Logits(LOGITS.clone()), seqs)):
        if wanted[row] is None:
            assert drawn.logprobs is None
            continue
        assert drawn.logprobs is not None
        assert drawn.logprobs.logprob == pytest.approx(raw[row, drawn.token_id].item(), abs=1e-5)
        likeliest = raw[row].sort(descending=True)
        told = drawn.logprobs.top
        assert [token_id for token_id, _ in told] == likeliest.indices[: wanted[row]].tolist()
        values = [logprob for _, logprob in told]
        assert values == pytest.approx(likeliest.values[: wanted[row]].tolist(), abs=1e-5)


def test_wanting_them_changes_no_draw() -> None:
    with_them = [prompt([3, 4], params(5, row)) for row in range(6)]
    without = [prompt([3, 4], params(None, row)) for row in range(6)]
    first = [one.token_id for one in sample(Logits(LOGITS.clone()), with_them)]
    assert first == [one.token_id for one in sample(Logits(LOGITS.clone()), without)]


def test_equals_are_told_in_order_of_their_ids() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    seq = prompt([0], SamplingParams(seed=0, temperature=0.0, num_logprobs=4))
    (drawn,) = sample(Logits(logits), [seq])
    assert drawn.logprobs is not None
    assert [token_id for token_id, _ in drawn.logprobs.top] == [1, 3, 2, 4]


def test_a_row_is_told_the_same_alone_and_among_others() -> None:
    seqs = [prompt([3, 4], params(row, row)) for row in range(6)]
    together = [one.logprobs for one in sample(Logits(LOGITS.clone()), seqs)]
    for row in range(6):
        (alone,) = sample(Logits(LOGITS[row : row + 1].clone()), [prompt([3, 4], params(row, row))])
        assert alone.logprobs == together[row]
