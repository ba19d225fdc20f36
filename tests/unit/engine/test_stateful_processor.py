"""A processor with a state like a grammar's: an answer keeps to it wherever it is computed.

Brackets have to match, and the prompt's count: what may come next depends on the order of all
tokens so far. So a token that is missed, repeated or taken out of order shows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Items
from typing import Any

import pytest
import torch
from support.sampling_open import opened
from support.tiny_engine import generate, tiny_engine

from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeScheduler, DecodeStream, StreamState
from engine.engine import Engine
from engine.intake import StopRule
from engine.sampling import processors
from engine.sampling.params import SamplingParams
from engine.sampling.processors import LogitsProcessor, Processors

OPENING = {50: 150, 51: 151, 52: 152, 53: 153}
"""Token ids, and those that close them."""
DEEPEST = 4
PROMPT = [7, 50, 8, 51, 52, 152, 9]
NUM_TOKENS = 40


class Brackets(LogitsProcessor):
    """Only brackets: any may open, up to a depth, and the innermost open one may be closed."""

    def __init__(self, token_ids: Items[int]) -> None:
        self._awaited: list[int] = []
        for token_id in token_ids:
            self.advance(token_id)

    @classmethod
    def of(cls, params: SamplingParams, prompt_token_ids: Items[int]) -> Brackets:
        return cls(prompt_token_ids)

    def advance(self, token_id: int) -> None:
        if token_id in OPENING:
            self._awaited.append(OPENING[token_id])
        elif token_id in OPENING.values():
            assert token_id == self._awaited.pop(), "not the innermost one"

    def allowed(self) -> list[int]:
        opening = list(OPENING) if len(self._awaited) < DEEPEST else []
        return opening + self._awaited[-1:]

    @staticmethod
    def apply(logits: torch.Tensor, rows: Items[int], processors: Items[Brackets]) -> None:
        for row, processor in zip(rows, processors, strict=True):
            allowed = processor.allowed()
            kept = logits[row, allowed]
            logits[row] = -torch.inf
            logits[row, allowed] = kept


@pytest.fixture(autouse=True)
def brackets_are_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "KINDS", (*processors.KINDS, Brackets))


def open_message(emitted: Items[int] = (), number: int = 0) -> pb.Open:
    sampling = {"temperature": 3.0, "top_p": 1.0, "frequency_penalty": 1.0}
    bias = dict.fromkeys(OPENING.values(), 4.0)  # so that as many close as open
    return pb.Open(
        stream_id=number + 1,
        choice_index=number,
        prompt_token_ids=PROMPT,
        emitted_token_ids=emitted,
        sampling=pb.Sampling(seed=11, logit_bias=bias, **sampling),  # type: ignore[arg-type]
        max_tokens=NUM_TOKENS,
    )


@functools.cache
def answer_alone(number: int = 0) -> list[int]:
    return generate(tiny_engine(), opened(open_message(number=number)), NUM_TOKENS)


def test_every_token_of_an_answer_is_one_that_the_tokens_before_it_allow() -> None:
    answer = answer_alone()
    state = Brackets(PROMPT)
    seen = set()
    for token_id in answer:
        assert token_id in state.allowed()
        state.advance(token_id)
        seen.add(len(state.allowed()))
    assert seen == {1, len(OPENING), len(OPENING) + 1}, (
        "it was never as deep, or as high, as can be"
    )
    assert answer != answer_alone(1)


@pytest.mark.parametrize("num_emitted", [1, 2, 17, NUM_TOKENS - 1])
def test_another_worker_goes_on_from_the_emitted_tokens(num_emitted: int) -> None:
    answer = answer_alone()
    seq = opened(open_message(answer[:num_emitted]))
    assert generate(tiny_engine(), seq, NUM_TOKENS) == answer


def stream(number: int, emitted: Items[int] = ()) -> DecodeStream:
    sequence = opened(open_message(emitted, number))
    key = StreamKey(1, number)
    sequence.key = key
    return DecodeStream(
        key=key,
        request_id=f"request-{number}",
        sequence=sequence,
        stop=StopRule(NUM_TOKENS, frozenset()),
        deadline=1e9,
        transfer=None,
        handoff=None,
        queued_at=0.0,
        num_input_tokens=sequence.num_tokens,
    )


def decode(engine: Engine, streams: list[DecodeStream]) -> int:
    """Runs all to their ends as a decode worker does; returns the number of preemptions."""
    scheduler = DecodeScheduler(
        engine.kv, max_num_batched_tokens=16, max_num_seqs=8, watermark_blocks=1
    )
    for each in streams:
        scheduler.enqueue(each)
    for _ in range(1000):
        scheduler.admit()
        engine.step(scheduler.schedule())
        for each in streams:
            running = each.state is StreamState.RUNNING
            if running and each.sequence.num_emitted_tokens == NUM_TOKENS:
                scheduler.remove(each)
                engine.kv.free(each.sequence)
        if all(each.state is StreamState.ENDED for each in streams):
            return scheduler.num_preemptions
    raise AssertionError("not every stream has ended")


def test_preempted_streams_and_one_from_elsewhere_end_with_the_answers_they_get_alone() -> None:
    answers = [answer_alone(number) for number in range(3)]
    streams = [stream(0), stream(1), stream(2, answers[2][:13])]
    num_preemptions = decode(tiny_engine(num_blocks=20, block_size=4), streams)
    assert num_preemptions > 0
    for each, answer in zip(streams, answers, strict=True):
        assert each.sequence.token_ids[len(PROMPT) :] == answer


def test_state_is_not_taken_back_with_tokens() -> None:
    made: Any = Processors(SamplingParams(seed=0), PROMPT)
    made.at([*PROMPT, 50, 53])
    with pytest.raises(AssertionError, match="taken back"):
        made.at([*PROMPT, 50])
