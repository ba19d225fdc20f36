"""The default model on the engine: a real answer, in the dtype this machine prefers."""

from __future__ import annotations

import pytest
import torch
from support.tiny_engine import generate, prompt
from tokenizers import Tokenizer

from baton.block_hash import HashDomain
from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.kv_layout import KvDtype, KvLayout
from engine.engine import Engine

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(DEFAULT_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_engine_knows_the_capital_of_france(checkpoint: Checkpoint, dtype: KvDtype) -> None:
    config = checkpoint.config
    layout = KvLayout(8, config.num_kv_heads, config.num_layers, 16, config.head_dim, dtype)
    engine = Engine(
        checkpoint,
        dtype=getattr(torch, dtype),
        layout=layout,
        memory=memoryview(bytearray(layout.num_bytes)),
        domain=HashDomain(b"k" * 32, checkpoint.revision, dtype),
    )
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    question = tokenizer.encode(QUESTION).ids
    for chunk in (512, 9):
        seq = prompt(question)
        answer = generate(engine, seq, 8, chunk)
        engine.kv.free(seq)
        assert answer[-1] in checkpoint.eos_token_ids
        assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."
