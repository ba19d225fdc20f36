"""A worker's parts where the plan has a GPU: here one that is the CPU, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from support.tiny_engine import generate, prompt, tokens
from support.tiny_models import write_tiny_llama
from support.triton_cases import interpreted_or_skip

from baton.config import parse_config
from engine.gpu.plan import GpuPlan
from engine.setup import plan_engine
from engine.worker_parts import WorkerParts

interpreted_or_skip("engine.attention.triton_paged")


async def test_a_workers_pool_lies_where_its_plan_says(tmp_path: Path) -> None:
    engine = {"dtype": "float32", "kv_cache_bytes": 1 << 20, "cpu_kernels": "torch"}
    model = str(write_tiny_llama(tmp_path / "model"))
    config = parse_config({"model": model, "engine": engine, "pools": {"decode": {}}})
    config = config.for_pool("decode")
    on_cpu = plan_engine(config, secret="s")
    gpu = GpuPlan(torch.device("cpu"), max_num_seqs=2, max_model_len=64)
    answers = []
    for plan in (on_cpu, replace(on_cpu, gpu=gpu)):
        on_gpu = plan.gpu_memory()
        assert (on_gpu is None) == (plan.gpu is None)
        memory = memoryview(bytearray(plan.layout.num_bytes)) if on_gpu is None else on_gpu
        parts = await WorkerParts.build(
            config, plan, memory, memory_fd=None, worker_id="w", role="decode"
        )
        answers.append(generate(parts.engine, prompt(tokens(20)), 6))
        assert any(memory.tolist())
        assert parts.identity.num_blocks == on_cpu.layout.num_blocks
        await parts.close()
    assert answers[0] == answers[1]
