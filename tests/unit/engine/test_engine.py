"""Steps of the whole engine: equal tokens however they are scheduled, cached or repeated."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.architecture_check import score
from support.tiny_engine import DOMAIN, TINY, generate, prompt, run_step, tiny_engine, tokens
from support.tiny_models import config_json, tiny_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from baton.kv_layout import KvDtype
from engine.chunked_prefill import prefill_chunks
from engine.engine import Engine, Scheduled
from engine.native.kernels import Choice
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import sample
from engine.sequence import Sampled, Sequence

NUM_TOKENS = 24


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = tiny_engine()
    yield engine
    engine.kv.pool.check()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What transformers generates greedily after ``tokens(37)``."""
    model = LlamaForCausalLM(LlamaConfig(**config_json(TINY))).eval()
    model.load_state_dict(tiny_tensors(TINY), strict=False)
    token_ids = tokens(37)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[37:]


@pytest.mark.parametrize("chunk", [1, 5, 16, 36, 37, 512])
def test_greedy_output_equals_transformers_for_any_chunk(
    engine: Engine, expected: list[int], chunk: int
) -> None:
    assert generate(engine, prompt(tokens(37)), NUM_TOKENS, chunk) == expected


def test_greedy_output_is_the_same_in_any_mixture(engine: Engine, expected: list[int]) -> None:
    seq = prompt(tokens(37))
    others = [prompt(tokens(length, seed=length)) for length in (3, 18, 64)]
    sizes = [1, 7, 20, 33]
    turn = 0
    while seq.num_emitted_tokens < NUM_TOKENS:
        scheduled = []
        for index, item in enumerate([*others, seq]):
            num_tokens = min(sizes[(turn + index) % 4], item.num_remaining)
            assert engine.kv.ensure_blocks(item, item.num_computed_tokens + num_tokens)
            scheduled.append(Scheduled(item, num_tokens))
        engine.step(scheduled[turn % 3 :])
        turn += 1
    assert seq.token_ids[37:] == expected


def test_step_returns_the_complete_sequences_in_the_order_scheduled(engine: Engine) -> None:
    partial, whole, single = prompt(tokens(20)), prompt(tokens(9)), prompt(tokens(1))
    for seq in (partial, whole, single):
        assert engine.kv.ensure_blocks(seq, seq.num_tokens)
    sampled = engine.step([Scheduled(partial, 12), Scheduled(whole, 9), Scheduled(single, 1)])
    assert [item.seq for item in sampled] == [whole, single]
    assert [item.token_id for item in sampled] == [whole.token_ids[-1], single.token_ids[-1]]
    assert [seq.num_computed_tokens for seq in (partial, whole, single)] == [12, 9, 1]
    assert [seq.num_tokens for seq in (partial, whole, single)] == [20, 10, 2]
    assert engine.step([]) == []


@pytest.mark.parametrize(("num_prompt", "num_held"), [(37, 32), (33, 32), (15, 0), (48, 48)])
def test_a_cached_prefix_changes_no_token_and_is_not_computed_again(
    engine: Engine, num_prompt: int, num_held: int
) -> None:
    cold = prompt(tokens(num_prompt))
    first = generate(engine, cold, NUM_TOKENS)
    engine.kv.free(cold)
    warm = prompt(tokens(num_prompt))
    assert engine.kv.hold_prefix(warm) == num_held
    assert warm.num_cached_tokens == num_held
    assert warm.num_computed_tokens == min(num_held, num_prompt - 1)
    assert generate(engine, warm, NUM_TOKENS) == first
    assert warm.num_computed_tokens == num_prompt + NUM_TOKENS - 1


@pytest.mark.parametrize("num_prompt", [37, 48])
def test_inputs_that_take_over_each_others_blocks_get_the_same_tokens(
    engine: Engine, num_prompt: int
) -> None:
    alone = prompt(tokens(num_prompt))
    alone.root_hash = DOMAIN.root(cache_salt="alone")
    first = generate(engine, alone, NUM_TOKENS)
    together = [prompt([*tokens(num_prompt), *own]) for own in ([], [], [9])]
    for seq in together:
        assert engine.kv.ensure_blocks(seq, seq.num_tokens)
    num_computed = 0
    while waiting := [seq for seq in together if not seq.num_emitted_tokens]:
        for seq in waiting:
            engine.kv.extend_prefix(seq)
        chunks = prefill_chunks(waiting, 10, engine.kv)
        num_computed += sum(chunk.num_tokens for chunk in chunks)
        engine.step(chunks)
        engine.kv.pool.check()
    # All after the last full block, or the last token alone, is everyone's own.
    assert num_computed == (32 + 5 + 5 + 6 if num_prompt == 37 else 48 + 1 + 1)
    for seq in together[:2]:
        assert generate(engine, seq, NUM_TOKENS) == first


def test_a_second_turn_finds_the_first_turn_answer(engine: Engine) -> None:
    first = prompt(tokens(20))
    generate(engine, first, 30)
    second = prompt([*first.token_ids, *tokens(5, seed=9)])
    assert engine.kv.num_cached_prefix(second) == 48


def test_recomputing_a_fully_cached_input_writes_no_shared_block(engine: Engine) -> None:
    cold = prompt(tokens(48))
    generate(engine, cold, 1)
    warm = prompt(tokens(48))
    engine.kv.hold_prefix(warm)
    assert warm.block_table == cold.block_table
    # Other bytes than a recomputation would write: only a write can change them back.
    engine.kv.tensor[warm.block_table[-1], :, :, :, -1] += 0.25
    before = engine.kv.tensor[: engine.kv.layout.num_blocks].clone()
    run_step(engine, warm)
    assert torch.equal(engine.kv.tensor[: engine.kv.layout.num_blocks], before)
    assert engine.kv.tensor[engine.kv.layout.scratch_block].any()
    run_step(engine, warm)
    assert torch.equal(engine.kv.tensor[cold.block_table], before[cold.block_table])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("evicts", [True, False])
def test_preemption_by_recompute_changes_no_token(temperature: float, evicts: bool) -> None:
    sampling = SamplingParams(seed=5, temperature=temperature, top_p=0.9)
    through = generate(tiny_engine(), prompt(tokens(30), sampling), NUM_TOKENS)
    engine = tiny_engine(num_blocks=8)
    seq = prompt(tokens(30), sampling)
    generate(engine, seq, 11)
    engine.kv.free(seq)
    if evicts:
        other = prompt(tokens(128, seed=1))
        assert engine.kv.ensure_blocks(other, 128)
        engine.kv.free(other)
    assert engine.kv.hold_prefix(seq) == (0 if evicts else 32)
    assert generate(engine, seq, NUM_TOKENS, chunk=7) == through
    engine.kv.pool.check()


def test_an_attempt_repeated_from_emitted_tokens_goes_on_alike(engine: Engine) -> None:
    sampling = SamplingParams(seed=5, choice_index=2, temperature=1.0)
    through = generate(engine, prompt(tokens(30), sampling), NUM_TOKENS)
    again = Sequence(
        key=None,
        token_ids=[*tokens(30), *through[:9]],
        num_prompt_tokens=30,
        sampling=sampling,
        root_hash=b"another",
    )
    assert generate(tiny_engine(), again, NUM_TOKENS) == through


def test_kv_copied_to_another_engine_is_decoded_alike(engine: Engine, expected: list[int]) -> None:
    source = prompt(tokens(37))
    run_step(engine, source)
    other = tiny_engine(num_blocks=9)
    busy, seq = prompt(tokens(40, seed=3)), prompt(tokens(37))
    for item in (busy, seq):
        assert other.kv.ensure_blocks(item, item.num_tokens)
    other.kv.tensor[seq.block_table] = engine.kv.tensor[source.block_table]
    other.kv.adopt(seq, 37)
    seq.token_ids.append(source.token_ids[-1])
    assert generate(other, seq, NUM_TOKENS) == expected
    assert other.kv.num_cached_prefix(prompt(seq.token_ids)) == 48


@pytest.mark.parametrize("cut", [[20, 17], [12, 1, 24], [36, 1], [1] * 37])
def test_a_prompt_is_computed_alike_wherever_it_is_cut(cut: list[int]) -> None:
    def computed(chunks: list[int]) -> torch.Tensor:
        engine = tiny_engine(dtype="bfloat16", cpu_kernels="native")
        if engine.kv.zeroes_new_blocks:
            pytest.skip("this processor does not multiply bfloat16")
        return score(engine, tokens(37), chunks)

    assert torch.equal(computed(cut), computed([37]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cpu_kernels", ["native", "torch"])
def test_garbage_left_in_free_blocks_reaches_nobody(dtype: KvDtype, cpu_kernels: Choice) -> None:
    expected = generate(
        tiny_engine(dtype=dtype, cpu_kernels=cpu_kernels), prompt(tokens(37)), NUM_TOKENS
    )
    engine = tiny_engine(dtype=dtype, cpu_kernels=cpu_kernels)
    engine.kv.tensor.fill_(torch.nan)
    first, second = prompt(tokens(37)), prompt(tokens(3, seed=4))
    for seq in (first, second):
        run_step(engine, seq)
    while first.num_emitted_tokens < NUM_TOKENS:
        for seq in (first, second):
            assert engine.kv.ensure_blocks(seq, seq.num_tokens)
        engine.step([Scheduled(first, 1), Scheduled(second, 1)])
    assert first.token_ids[37:] == expected


def test_a_step_that_fails_leaves_every_sequence_as_it_was(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    seq = prompt(tokens(37))
    assert engine.kv.ensure_blocks(seq, 37)
    with monkeypatch.context() as patch:
        patch.setattr("engine.engine.sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step([Scheduled(seq, 37)])
    assert (seq.num_tokens, seq.num_computed_tokens) == (37, 0)
    assert generate(engine, seq, NUM_TOKENS) == expected


def test_a_draw_position_counts_emitted_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def spy(logits: torch.Tensor, seqs: list[Sequence]) -> list[Sampled]:
        seen.extend(seq.num_emitted_tokens for seq in seqs)
        return sample(logits, seqs)

    monkeypatch.setattr("engine.engine.sample", spy)
    seq = prompt(tokens(9))
    generate(engine, seq, 2)
    engine.kv.free(seq)
    generate(engine, seq, 4)
    assert seen == [0, 1, 2, 3]


def openmp_threads() -> int:
    """What oneDNN uses in the calling thread, asked of the library itself."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split()[-1] for line in lines if "libgomp" in line}
    if not paths:
        pytest.skip("needs a torch that computes with libgomp")
    return int(ctypes.CDLL(paths.pop()).omp_get_max_threads())


def test_threads_hold_in_a_thread_that_steps() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        torch.set_num_threads(1)
        engine = tiny_engine(threads=3)

        def work() -> None:
            run_step(engine, prompt(tokens(4)))
            seen.append(openmp_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_the_engine_names_its_limits(engine: Engine) -> None:
    assert (engine.vocab_size, engine.max_position) == (288, 1024)
