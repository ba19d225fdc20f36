"""Compares an engine that was made from a checkpoint with transformers' own model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.tiny_architectures import oracle_logits
from support.tiny_engine import DOMAIN, kv_layout, prompt, tokens

from baton.checkpoint.checkpoint import LoadFormat, open_checkpoint
from engine.engine import Engine, Scheduled
from engine.native.kernels import Choice

NUM_TOKENS = 75  # over every limit of the variants, and no multiple of any


def engine_for(
    path: Path,
    load_format: LoadFormat = "auto",
    dtype: torch.dtype = torch.float32,
    cpu_kernels: Choice = "torch",
) -> Engine:
    checkpoint = open_checkpoint(str(path), load_format)
    layout = replace(
        kv_layout(checkpoint.config, num_blocks=20, block_size=16),
        dtype=str(dtype).removeprefix("torch."),
    )
    return Engine(
        checkpoint,
        dtype=dtype,
        layout=layout,
        memory=memoryview(bytearray(layout.num_bytes)),
        domain=DOMAIN,
        cpu_kernels=cpu_kernels,
    )


def score(engine: Engine, token_ids: list[int], chunks: list[int]) -> torch.Tensor:
    """The logits after each token, computed chunk by chunk."""
    seq, rows = prompt(token_ids), []
    for num_tokens in chunks:
        assert engine.kv.ensure_blocks(seq, seq.num_computed_tokens + num_tokens)
        rows.append(engine.score(Scheduled(seq, num_tokens)))
    engine.kv.free(seq)
    return torch.cat(rows)


def assert_equals_oracle(engine: Engine, model: Any) -> None:
    """Logits within 1e-4 and the same greedy tokens, in any chunks, over every limit."""
    token_ids = tokens(NUM_TOKENS)
    expected = oracle_logits(model, token_ids)
    for chunks in ([75], [33, 1, 1, 19, 21]):
        out = score(engine, token_ids, chunks)
        assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4, chunks
    seqs = [prompt(token_ids[:12]), prompt(token_ids[:60])]
    while min(seq.num_emitted_tokens for seq in seqs) < 10:
        step = [Scheduled(seq, min(23, seq.num_remaining)) for seq in seqs]
        for seq, num_tokens in ((item.seq, item.num_tokens) for item in step):
            assert engine.kv.ensure_blocks(seq, seq.num_computed_tokens + num_tokens)
        engine.step(step)
    for seq in seqs:
        best = oracle_logits(model, seq.token_ids)[seq.num_prompt_tokens - 1 : -1].argmax(dim=-1)
        assert best.tolist() == seq.token_ids[seq.num_prompt_tokens :]
