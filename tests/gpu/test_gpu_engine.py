"""An engine on a GPU, in float32: token for token what one on the CPU answers."""

from __future__ import annotations

import pytest
import torch
from support.tiny_engine import generate, prompt, tiny_engine, tokens

from engine.engine import Engine, Scheduled
from engine.gpu.plan import GpuPlan
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence

MAX_NUM_SEQS = 6


@pytest.fixture(scope="module")
def engine() -> Engine:
    """With its graphs."""
    plan = GpuPlan(torch.device("cuda", 0), "triton", MAX_NUM_SEQS, max_model_len=512)
    return tiny_engine(num_blocks=200, gpu=plan)


def step(engine: Engine, *seqs: Sequence) -> None:
    for seq in seqs:
        assert engine.kv.ensure_blocks(seq, seq.num_tokens)
    engine.step([Scheduled(seq, seq.num_remaining) for seq in seqs])


@pytest.mark.parametrize("num", [1, 2, 3, 6, 9])
def test_streams_together_are_the_cpus_each(engine: Engine, num: int) -> None:
    """Of every padded size, and one beyond the graphs."""
    cpu = tiny_engine(num_blocks=200)
    expected = [generate(cpu, prompt(tokens(20 + n, seed=n)), 30) for n in range(num)]
    seqs = [prompt(tokens(20 + n, seed=n)) for n in range(num)]
    for seq in seqs:
        step(engine, seq)
    while seqs[0].num_emitted_tokens < 30:
        step(engine, *seqs)
    assert [seq.token_ids[seq.num_prompt_tokens :] for seq in seqs] == expected
    for seq in seqs:
        engine.kv.free(seq)


def test_sequences_that_come_and_go_keep_their_answers(engine: Engine) -> None:
    cpu = tiny_engine(num_blocks=200)
    lengths = [9, 33, 17, 25, 5, 60, 41]
    expected = {n: generate(cpu, prompt(tokens(n, seed=n)), 25) for n in lengths}
    waiting = [prompt(tokens(n, seed=n)) for n in lengths]
    running: list[Sequence] = []
    while waiting or running:
        if waiting and len(running) < 4:
            running.append(waiting.pop())
        step(engine, *reversed(running))
        for seq in [seq for seq in running if seq.num_emitted_tokens == 25]:
            assert seq.token_ids[seq.num_prompt_tokens :] == expected[seq.num_prompt_tokens]
            engine.kv.free(seq)
            running.remove(seq)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=3, temperature=0.9),
        SamplingParams(seed=3, temperature=1.5, top_k=7, top_p=0.8),
        SamplingParams(seed=3, temperature=0.8, min_p=0.05, repetition_penalty=1.3),
        SamplingParams(seed=3, temperature=0.0, logit_bias=((9, 50.0),), presence_penalty=60.0),
    ],
    ids=["plain", "limited", "penalized", "biased"],
)
def test_drawn_answers_are_the_cpus(engine: Engine, sampling: SamplingParams) -> None:
    expected = generate(tiny_engine(), prompt(tokens(12), sampling), 20)
    seq = prompt(tokens(12), sampling)
    assert generate(engine, seq, 20) == expected
    engine.kv.free(seq)


def test_log_probabilities_are_the_cpus(engine: Engine) -> None:
    sampling = SamplingParams(seed=3, temperature=0.0, num_logprobs=4)
    told = []
    for own in (tiny_engine(), engine):
        seq = prompt(tokens(30), sampling)
        assert own.kv.ensure_blocks(seq, 30)
        (sampled,) = own.step([Scheduled(seq, 30)])
        assert sampled.logprobs is not None
        told.append(sampled.logprobs)
        own.kv.free(seq)
    assert told[0].logprob == pytest.approx(told[1].logprob, abs=1e-3)
    assert [token_id for token_id, _ in told[0].top] == [token_id for token_id, _ in told[1].top]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=0, temperature=0.0),
        SamplingParams(seed=0, top_k=5, top_p=0.9),
        SamplingParams(seed=0, repetition_penalty=1.2, presence_penalty=0.5),
        SamplingParams(seed=0, logit_bias=((3, 2.0),), min_tokens=90, stop_token_ids=(5,)),
    ],
    ids=["greedy", "limited", "penalties", "bias"],
)
def test_a_decode_step_waits_for_its_tokens_alone(engine: Engine, sampling: SamplingParams) -> None:
    """torch warns of every other wait that it knows of."""
    seqs = [prompt(tokens(20, seed=n), sampling) for n in range(3)]
    for seq in seqs:
        step(engine, seq)
    step(engine, *seqs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step(engine, *seqs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for seq in seqs:
        engine.kv.free(seq)
