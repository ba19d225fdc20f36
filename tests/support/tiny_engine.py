"""Engines on tiny random Llamas, and what a worker does with one, in a loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from support.tiny_models import TinyLlama, config_json, tiny_tensors

from baton.block_hash import HashDomain
from baton.checkpoint.checkpoint import Checkpoint
from baton.checkpoint.model_config import ModelConfig
from baton.kv_layout import KvDtype, KvLayout
from engine.engine import Engine, Scheduled
from engine.gpu.plan import GpuPlan
from engine.native.kernels import Choice
from engine.platform import resolve_dtype
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence

DOMAIN = HashDomain(key=b"k" * 32, weights_revision="tiny", kv_dtype="float32")
TINY = TinyLlama(num_heads=4, num_kv_heads=2)


def model_config(model: TinyLlama) -> ModelConfig:
    return ModelConfig.from_json(config_json(model), where="tiny")


def kv_layout(config: ModelConfig, num_blocks: int, block_size: int) -> KvLayout:
    return config.kv_layout(num_blocks=num_blocks, block_size=block_size, dtype="float32")


def tiny_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 16,
    threads: int = 0,
    gpu: GpuPlan | None = None,
    dtype: KvDtype = "float32",
    cpu_kernels: Choice = "torch",
) -> Engine:
    config = model_config(TINY)
    layout = replace(kv_layout(config, num_blocks, block_size), dtype=dtype)
    weights = {name: tensor.to(resolve_dtype(dtype)) for name, tensor in tiny_tensors(TINY).items()}
    checkpoint = Checkpoint(
        name="tiny",
        folder=Path(),
        weights_source=Path(),
        config=config,
        revision="tiny",
        eos_token_ids=(),
        bos_token=None,
        eos_token=None,
        chat_template=None,
    )
    return Engine(
        checkpoint,
        dtype=resolve_dtype(dtype),
        layout=layout,
        memory=gpu.memory(layout) if gpu else memoryview(bytearray(layout.num_bytes)),
        domain=DOMAIN,
        threads=threads,
        weights=weights,
        gpu=gpu,
        cpu_kernels=cpu_kernels,
    )


def tokens(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids of the tiny vocabulary."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (num_tokens,), generator=random).tolist()


def prompt(token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
    """A sequence with nothing computed; greedy by default."""
    return Sequence(
        key=None,
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids),
        sampling=sampling or SamplingParams(seed=7, temperature=0.0),
        root_hash=DOMAIN.root(),
    )


def run_step(engine: Engine, seq: Sequence, chunk: int = 512) -> None:
    """Computes the sequence's next ``chunk`` tokens, or all that remain."""
    run_step_of(engine, [seq], chunk)


def run_step_of(engine: Engine, seqs: list[Sequence], chunk: int) -> None:
    """The same of several sequences together."""
    step = [Scheduled(seq, min(chunk, seq.num_remaining)) for seq in seqs]
    for seq, num_tokens in step:
        assert engine.kv.ensure_blocks(seq, seq.num_computed_tokens + num_tokens)
    engine.step(step)


def generate(engine: Engine, seq: Sequence, num_tokens: int, chunk: int = 512) -> list[int]:
    """Runs one sequence until it has ``num_tokens`` emitted tokens, and returns them."""
    while seq.num_emitted_tokens < num_tokens:
        run_step(engine, seq, chunk)
    return seq.token_ids[seq.num_prompt_tokens :]
