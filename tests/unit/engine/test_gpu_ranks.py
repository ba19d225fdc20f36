"""Ranks that have a GPU each, on CPUs with Triton's interpreter and gloo: they answer as one does.

What cannot be seen here, NCCL and what graphs of it replay, is for a machine with two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.architecture_check import score
from support.rank_pool import RankPool
from support.tiny_architectures import VARIANTS, Variant, save_variant
from support.tiny_engine import prompt, run_step_of, tokens
from support.triton_cases import interpreted_or_skip

from baton.parallelism import Parallelism
from engine.engine import Engine

gpu_plan = interpreted_or_skip("engine.gpu.plan")
interpreted_or_skip("engine.attention.triton_paged")

pytestmark = pytest.mark.usefixtures("one_thread")

_SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
MODELS = {
    "llama": VARIANTS["llama"],
    "llama, 3 KV heads": Variant("Llama", _SIX_HEADS),
    "qwen3": VARIANTS["qwen3"],
    "mistral, window": VARIANTS["mistral, window"],
}
PLAN = gpu_plan.GpuPlan(torch.device("cpu"), "triton", max_num_seqs=5, max_model_len=200)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(3, interpreted=True)
    yield pool
    pool.close()


def greedy(engine: Engine) -> list[list[int]]:
    """Prompts in chunks, beside decodes and alone; more decodes than are recorded, fewer that are
    padded, and as many: every kind of step, of which all ranks have to launch the same."""
    seqs = [prompt(tokens(num, seed)) for seed, num in enumerate((1, 18, 33, 5, 9, 41))]
    while any(seq.num_emitted_tokens < 6 for seq in seqs):
        going = [seq for seq in seqs if seq.num_emitted_tokens < 6 + seq.num_prompt_tokens // 8]
        run_step_of(engine, going, 17)
    for seq in seqs:
        engine.kv.free(seq)
    return [seq.token_ids[seq.num_prompt_tokens :][:6] for seq in seqs]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", 2), ("llama", 4), ("llama, 3 KV heads", 3), ("qwen3", 2), ("mistral, window", 2)],
)
def test_ranks_with_a_gpu_each_give_what_one_process_gives(
    ranks: RankPool, tmp_path: Path, name: str, tensor: int
) -> None:
    model = tmp_path / "model"
    save_variant(model, MODELS[name])
    token_ids = tokens(50)
    with ranks.engine(model, Parallelism()) as engine:
        expected, answers = score(engine, token_ids, [33, 1, 16]), greedy(engine)
    with ranks.engine(model, Parallelism(tensor), gpu=PLAN) as engine:
        assert engine.kv.layout.num_kv_heads == 1
        out = score(engine, token_ids, [33, 1, 16])
        assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-5
        assert greedy(engine) == answers
