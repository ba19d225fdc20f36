"""A seeded answer is the same wherever and however it is computed, with its log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.exact_sampling import greedy
from support.sampling_open import opened
from support.tiny_engine import TINY, tiny_engine, tokens
from support.tiny_models import config_json, tiny_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from baton.errors import InvalidRequestError
from baton.logprobs import TokenLogprobs
from baton.v1 import session_pb2 as pb
from engine.engine import Engine, Scheduled
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence

NUM_TOKENS = 24
PROMPT = tokens(30)

ALL: dict[str, Any] = {
    "temperature": 1.5,
    "top_p": 0.95,
    "top_k": 200,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.2,
    "logit_bias": {7: 4.0, 9: -50.0, 11: 3.0},
    "min_tokens": 15,
    "num_logprobs": 3,
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0, "num_logprobs": 0},
    "greedy with penalties": ALL | {"temperature": 0.0},
    "plain": {"temperature": 1.5, "top_p": 1.0},
    "all": ALL,
}

Answer = list[tuple[int, TokenLogprobs | None]]


def open_message(sampling: dict[str, Any], emitted: list[int], number: int = 0) -> pb.Open:
    return pb.Open(
        stream_id=1,
        choice_index=number,
        prompt_token_ids=PROMPT[: 30 - number],
        emitted_token_ids=emitted,
        sampling=pb.Sampling(seed=2**63 + 5, **sampling),
        max_tokens=100,
        stop_token_ids=[2, 7],
    )


def advance(engine: Engine, seqs: list[Sequence], answers: list[Answer], num_tokens: int) -> None:
    """Steps all of them together until each has as many tokens more."""
    for _ in range(num_tokens):
        for seq in seqs:
            assert engine.kv.ensure_blocks(seq, seq.num_tokens)
        sampled = engine.step([Scheduled(seq, seq.num_remaining) for seq in seqs])
        for answer, one in zip(answers, sampled, strict=True):
            answer.append((one.token_id, one.logprobs))


def answer_alone(sampling: dict[str, Any], number: int = 0, num_tokens: int = NUM_TOKENS) -> Answer:
    answer: Answer = []
    seq = opened(open_message(sampling, [], number))
    advance(tiny_engine(), [seq], [answer], num_tokens)
    return answer


def assert_same(answer: Answer, expected: Answer) -> None:
    """Tokens exactly; logarithms to the rounding of sums over another batch."""
    assert [token_id for token_id, _ in answer] == [token_id for token_id, _ in expected]
    for (_, ours), (_, theirs) in zip(answer, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [id_ for id_, _ in ours.top] == [id_ for id_, _ in theirs.top]


@pytest.fixture(scope="module", params=list(SAMPLINGS))
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def alone(sampling: dict[str, Any]) -> Answer:
    return answer_alone(sampling)


def test_in_a_batch_of_sixteen_every_answer_is_the_one_it_gets_alone() -> None:
    kinds = list(SAMPLINGS.values())
    seqs = [opened(open_message(kinds[at % 4], [], at)) for at in range(16)]
    answers: list[Answer] = [[] for _ in seqs]
    advance(tiny_engine(), seqs, answers, 17)
    for at, answer in enumerate(answers):
        assert_same(answer, answer_alone(kinds[at % 4], at, 17))


def test_after_a_preemption_the_answer_goes_on_as_it_would_have(
    sampling: dict[str, Any], alone: Answer
) -> None:
    engine, answer = tiny_engine(), []
    seq = opened(open_message(sampling, []))
    advance(engine, [seq], [answer], 10)
    engine.kv.free(seq)
    advance(engine, [seq], [answer], NUM_TOKENS - 10)
    assert_same(answer, alone)


@pytest.mark.parametrize("num_emitted", [1, 10, 23])
def test_another_worker_goes_on_from_the_emitted_tokens(
    sampling: dict[str, Any], alone: Answer, num_emitted: int
) -> None:
    emitted = [token_id for token_id, _ in alone[:num_emitted]]
    answer = alone[:num_emitted]
    seq = opened(open_message(sampling, emitted))
    advance(tiny_engine(), [seq], [answer], NUM_TOKENS - num_emitted)
    assert_same(answer, alone)


def test_stop_tokens_wait_for_min_tokens_however_likely_they_are() -> None:
    sampling = {"temperature": 0.0, "top_p": 1.0, "logit_bias": {7: 100.0}, "min_tokens": 6}
    ids = [token_id for token_id, _ in answer_alone(sampling)]
    assert 7 not in ids[:6]
    assert ids[6] == 7


def test_greedy_answer_with_penalties_is_the_references() -> None:
    model = LlamaForCausalLM(LlamaConfig(**config_json(TINY))).eval()
    model.load_state_dict(tiny_tensors(TINY), strict=False)
    params = SamplingParams(
        seed=0,
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias=((7, 4.0), (9, -50.0), (11, 3.0)),
        min_tokens=15,
        stop_token_ids=(2, 7),
    )
    emitted: list[int] = []
    raw: list[float] = []
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            logits = model(torch.tensor([PROMPT + emitted])).logits[0, -1]
            emitted.append(greedy(logits.tolist(), params, PROMPT, emitted))
            raw.append(logits.log_softmax(-1)[emitted[-1]].item())
    answer = answer_alone(SAMPLINGS["greedy with penalties"])
    assert [token_id for token_id, _ in answer] == emitted
    told = [logprobs.logprob for _, logprobs in answer if logprobs is not None]
    assert told == pytest.approx(raw, abs=1e-4)


def test_bias_of_a_token_that_the_model_lacks_is_refused() -> None:
    message = open_message({"logit_bias": {288: 1.0}}, [])
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        opened(message)


def test_stop_token_that_the_model_lacks_is_never_forbidden() -> None:
    message = open_message({"min_tokens": 3}, [])
    message.stop_token_ids.append(999)
    assert opened(message).sampling.stop_token_ids == (2, 7)


def test_absent_sampling_fields_change_nothing() -> None:
    assert opened(open_message({"temperature": 1.0, "top_p": 1.0}, [])).sampling == SamplingParams(
        seed=2**63 + 5, stop_token_ids=(2, 7)
    )
