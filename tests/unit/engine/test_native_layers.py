"""All layers by one native call have the bits of one layer after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.architecture_check import engine_for
from support.cpu_kernels import computing_with
from support.tiny_architectures import VARIANTS, save_variant
from support.tiny_engine import prompt, tokens

from baton.kv_layout import KvLayout
from engine.engine import Engine, Scheduled
from engine.models.decoder import Decoder
from engine.native.kernels import kernels
from engine.sequence import Sequence

DENSE = [
    "llama",
    "llama with biases",
    "mistral, window of one block",
    "qwen2, window of the upper layers",
    "qwen3 with biases",
    "smollm3",
]
NEVER = ["mixtral", "qwen3 moe, every second layer", "deepseek v2"]


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with computing_with("native"):
        found = kernels()
        assert found is not None
        if not found.attends_chunks(KvLayout(1, 1, 1, 16, 64, "bfloat16")):
            pytest.skip("this processor does not multiply pairs of bfloat16")
        yield


def made(path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Engine, Decoder]:
    engine = engine_for(path, dtype=dtype, cpu_kernels="native")
    return engine, engine._model


def answers(engine: Engine, seed: int) -> list[list[int]]:
    """Sequences of several lengths that come one by one, in random steps."""
    dice = random.Random(seed)
    coming = [prompt(tokens(length, seed=length)) for length in (1, 40, 17, 33, 29)]
    running = [coming.pop()]
    for _ in range(40):
        if coming and dice.random() < 0.4:
            running.append(coming.pop())
        step = [
            Scheduled(each, dice.randint(1, min(25, each.num_remaining)))
            for each in running
            if dice.random() < 0.8 and each.num_tokens < 62
        ]
        for each in step:
            end = each.seq.num_computed_tokens + each.num_tokens
            assert engine.kv.ensure_blocks(each.seq, end)
        engine.step(step)
    assert not coming
    assert any(each.num_emitted_tokens > 5 for each in running)
    for each in running:
        engine.kv.free(each)
    return [each.token_ids for each in running]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_tokens_and_kv_are_those_of_layer_by_layer(
    tmp_path: Path, name: str, threads: int
) -> None:
    save_variant(tmp_path, VARIANTS[name])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (at_once, model), (layered, other) = made(tmp_path), made(tmp_path)
        assert model._at_once is not None
        other._at_once = None
        for seed in range(3):
            assert answers(at_once, seed) == answers(layered, seed)
        scratch = at_once.kv.layout.scratch_block
        assert torch.equal(at_once.kv.tensor[:scratch], layered.kv.tensor[:scratch])
        logits = [
            each.score(Scheduled(prompt_with_blocks(each), 20)) for each in (at_once, layered)
        ]
        assert torch.equal(*logits)
    finally:
        torch.set_num_threads(before)


def prompt_with_blocks(engine: Engine) -> Sequence:
    seq = prompt(tokens(20, seed=3))
    assert engine.kv.ensure_blocks(seq, 20)
    return seq


@pytest.mark.parametrize("name", NEVER)
def test_other_layers_are_computed_one_by_one(tmp_path: Path, name: str) -> None:
    save_variant(tmp_path, VARIANTS[name])
    assert made(tmp_path)[1]._at_once is None


def test_float32_is_computed_layer_by_layer(tmp_path: Path) -> None:
    save_variant(tmp_path, VARIANTS["llama"])
    assert made(tmp_path, torch.float32)[1]._at_once is None


def test_steps_grow_and_shrink(tmp_path: Path) -> None:
    save_variant(tmp_path, VARIANTS["llama"])
    engine, _ = made(tmp_path)
    token_ids = tokens(60)
    whole = prompt(token_ids)
    assert engine.kv.ensure_blocks(whole, 60)
    expected = engine.score(Scheduled(whole, 60))
    engine.kv.free(whole)
    seq, rows = prompt(token_ids), []
    for num_tokens in (1, 2, 40, 1, 16):
        assert engine.kv.ensure_blocks(seq, seq.num_computed_tokens + num_tokens)
        rows.append(engine.score(Scheduled(seq, num_tokens)))
    out = torch.cat(rows)
    assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.02
