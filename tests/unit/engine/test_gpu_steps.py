"""Steps as a GPU has them, on the CPU with Triton's interpreter: the same tokens as a CPU's.

What cannot be seen here is what a CUDA graph replays and what is copied meanwhile: tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_engine import generate, prompt, tiny_engine, tokens
from support.triton_cases import interpreted_or_skip

from engine.engine import Engine, Scheduled
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence

interpreted_or_skip("engine.attention.triton_paged")
gpu_plan = interpreted_or_skip("engine.gpu.plan")


def engine_as_on_gpu(**sizes: int) -> Engine:
    plan = gpu_plan.GpuPlan(torch.device("cpu"), "triton", max_num_seqs=4, max_model_len=200)
    return tiny_engine(**sizes, gpu=plan)


def step(engine: Engine, *seqs: Sequence, chunk: int = 512) -> None:
    scheduled = [Scheduled(seq, min(chunk, seq.num_remaining)) for seq in seqs]
    for item in scheduled:
        assert engine.kv.ensure_blocks(item.seq, item.seq.num_computed_tokens + item.num_tokens)
    engine.step(scheduled)


def test_an_answer_is_the_cpu_engines() -> None:
    expected = generate(tiny_engine(), prompt(tokens(40)), 12)
    assert generate(engine_as_on_gpu(), prompt(tokens(40)), 12, chunk=16) == expected


def test_sequences_that_come_and_go_keep_their_answers() -> None:
    """Rows of the recorded arrays change hands, and blocks do."""
    lengths, own = [9, 33, 17, 25, 5], tiny_engine()
    expected = [generate(own, prompt(tokens(n, seed=n)), 8) for n in lengths]
    engine = engine_as_on_gpu(num_blocks=24)
    waiting = [prompt(tokens(n, seed=n)) for n in lengths]
    running: list[Sequence] = []
    done: dict[int, list[int]] = {}
    while waiting or running:
        if waiting and len(running) < 3:
            running.append(waiting.pop(0))
            step(engine, running[-1])
        step(engine, *reversed(running))
        for seq in [seq for seq in running if seq.num_emitted_tokens >= 8]:
            done[seq.num_prompt_tokens] = seq.token_ids[seq.num_prompt_tokens :][:8]
            engine.kv.free(seq)
            running.remove(seq)
    assert [done[n] for n in lengths] == expected


def test_a_preempted_sequence_gets_other_blocks_and_the_same_answer() -> None:
    expected = generate(tiny_engine(), prompt(tokens(20)), 10)
    engine = engine_as_on_gpu()
    seq = prompt(tokens(20))
    generate(engine, seq, 5)
    engine.kv.free(seq)
    other = prompt(tokens(40, seed=3))
    generate(engine, other, 2)
    assert generate(engine, seq, 10) == expected


def test_a_prompt_that_is_cached_to_its_end_leaves_its_blocks_alone() -> None:
    engine = engine_as_on_gpu()
    expected = generate(engine, prompt(tokens(32)), 6)
    before = engine.kv.tensor.clone()
    seq = prompt(tokens(32))
    assert engine.kv.hold_prefix(seq) == 32
    shared = list(seq.block_table)
    assert generate(engine, seq, 6) == expected
    assert torch.equal(engine.kv.tensor[shared], before[shared])


def test_warming_up_touches_the_scratch_block_alone() -> None:
    engine = engine_as_on_gpu(num_blocks=8)
    before = engine.kv.tensor.clone()
    with torch.inference_mode():
        engine._gpu.warm_up()  # type: ignore[union-attr]
    scratch = engine.kv.layout.scratch_block
    assert torch.equal(engine.kv.tensor[:scratch], before[:scratch])
    assert not torch.equal(engine.kv.tensor[scratch], before[scratch])


def test_more_sequences_than_the_graphs_take_are_computed_all_the_same() -> None:
    own, engine = tiny_engine(), engine_as_on_gpu()
    expected = [generate(own, prompt(tokens(9, seed=n)), 4) for n in range(6)]
    seqs = [prompt(tokens(9, seed=n)) for n in range(6)]
    for _ in range(4):
        step(engine, *seqs)
    assert [seq.token_ids[9:] for seq in seqs] == expected


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(seed=3, temperature=0.9),
        SamplingParams(seed=3, temperature=1.5, top_k=7, top_p=0.8),
        SamplingParams(seed=3, temperature=0.8, min_p=0.05, repetition_penalty=1.3),
        SamplingParams(seed=3, temperature=0.0, logit_bias=((9, 50.0),), presence_penalty=60.0),
        SamplingParams(seed=3, temperature=0.7, num_logprobs=3),
    ],
    ids=["plain", "limited", "penalized", "biased", "told"],
)
def test_drawn_answers_are_the_cpu_engines(sampling: SamplingParams) -> None:
    expected = generate(tiny_engine(), prompt(tokens(12), sampling), 8)
    assert generate(engine_as_on_gpu(), prompt(tokens(12), sampling), 8) == expected


def test_scored_logits_are_the_cpu_engines() -> None:
    scores = []
    for engine in (tiny_engine(), engine_as_on_gpu()):
        seq = prompt(tokens(30))
        assert engine.kv.ensure_blocks(seq, 30)
        scores.append(engine.score(Scheduled(seq, 30)))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)


def test_tokens_come_back_in_the_order_scheduled() -> None:
    engine = engine_as_on_gpu()
    seqs = [prompt(tokens(9, seed=n)) for n in range(3)]
    step(engine, *seqs)
    step(engine, *seqs)
    for seq in seqs:
        assert engine.kv.ensure_blocks(seq, seq.num_tokens)
    order = [seqs[2], seqs[0], seqs[1]]  # each keeps its row
    assert [drawn.seq for drawn in engine.step([Scheduled(seq, 1) for seq in order])] == order
