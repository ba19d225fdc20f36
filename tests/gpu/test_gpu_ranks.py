"""Two ranks with a GPU each, over NCCL, in float32: token for token what one process answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_architectures import VARIANTS, save_variant
from support.tiny_engine import generate, prompt, tokens

from baton.parallelism import Parallelism
from engine.gpu.plan import GpuPlan

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


def test_two_gpus_answer_as_one_process(ranks: RankPool, tmp_path: Path) -> None:
    """Prompts are launched kernel by kernel, decodes are graphs with NCCL in them."""
    model = tmp_path / "model"
    save_variant(model, VARIANTS["llama"])
    plan = GpuPlan(torch.device("cuda", 0), "triton", max_num_seqs=4, max_model_len=200)
    answers = []
    for parallel, gpu in ((Parallelism(), None), (Parallelism(2), plan)):
        with ranks.engine(model, parallel, gpu=gpu) as engine:
            seqs = [prompt(tokens(num, seed=num)) for num in (5, 40, 65)]
            answers.append([generate(engine, seq, 20, chunk=19) for seq in seqs])
    assert answers[0] == answers[1]
