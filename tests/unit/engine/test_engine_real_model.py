"""The default model on the engine: a real answer, in the dtype this machine prefers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_engine import generate, prompt
from tokenizers import Tokenizer

from baton.block_hash import HashDomain
from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.kv_layout import KvLayout
from engine.engine import Engine

QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chunk", [512, 9])
def test_the_engine_knows_the_capital_of_france(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, chunk: int
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    config = checkpoint.config
    layout = KvLayout(
        8,
        config.num_kv_heads,
        config.num_layers,
        16,
        config.head_dim,
        dtype,  # type: ignore[arg-type]
    )
    engine = Engine(
        checkpoint,
        dtype=getattr(torch, dtype),
        layout=layout,
        memory=memoryview(bytearray(layout.num_bytes)),
        domain=HashDomain(b"k" * 32, checkpoint.revision, dtype),
    )
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    answer = generate(engine, prompt(tokenizer.encode(QUESTION).ids), 8, chunk)
    assert answer[-1] in checkpoint.eos_token_ids
    assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."
