"""An engine on several ranks gives what one process gives: logits, and greedy tokens at fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.architecture_check import score
from support.rank_pool import RankPool
from support.tiny_architectures import VARIANTS, Variant, save_variant
from support.tiny_engine import generate, prompt, run_step_of, tokens
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.parallelism import Parallelism
from engine.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")

_SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
MODELS = {
    "llama": VARIANTS["llama"],
    "llama, nothing divides": Variant(
        "Llama",
        {
            "vocab_size": 290,
            "intermediate_size": 101,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "llama, 3 KV heads": Variant("Llama", _SIX_HEADS),
    "qwen2": VARIANTS["qwen2"],
    "qwen3": VARIANTS["qwen3"],
    "smollm3": VARIANTS["smollm3"],
    "mistral, window": VARIANTS["mistral, window"],
    "mixtral": VARIANTS["mixtral"],
    "qwen3 moe": VARIANTS["qwen3 moe, every second layer"],
    "qwen3 moe, a dense layer": Variant(
        "Qwen3Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 41,
            "mlp_only_layers": [0],
            "attention_bias": True,
        },
    ),
    "deepseek v2": VARIANTS["deepseek v2, rope yarn, as before"],
    "deepseek v2, no latent query": VARIANTS["deepseek v2, queries without a latent vector"],
    "deepseek v3": VARIANTS["deepseek v3, rope yarn"],
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def greedy(engine: Engine) -> list[list[int]]:
    """The answers to prompts that are computed together, in chunks and alone."""
    seqs = [prompt(tokens(num, seed)) for seed, num in enumerate((3, 40, 65))]
    while min(seq.num_emitted_tokens for seq in seqs) < 8:
        run_step_of(engine, seqs, 19)
    for seq in seqs:
        engine.kv.free(seq)
    return [seq.token_ids[seq.num_prompt_tokens :] for seq in seqs]


@pytest.mark.parametrize(
    ("name", "tensor", "expert"),
    [
        ("llama", 2, 1),
        ("llama", 4, 1),
        ("llama, nothing divides", 2, 1),
        ("llama, nothing divides", 4, 1),
        ("llama, 3 KV heads", 3, 1),
        ("qwen2", 4, 1),
        ("qwen3", 2, 1),
        ("qwen3", 4, 1),
        ("smollm3", 4, 1),
        ("mistral, window", 4, 1),
        ("mixtral", 4, 1),
        ("mixtral", 1, 2),
        ("mixtral", 1, 4),
        ("mixtral", 2, 2),
        ("qwen3 moe", 2, 2),
        ("qwen3 moe, a dense layer", 1, 2),
        ("qwen3 moe, a dense layer", 1, 4),
        ("qwen3 moe, a dense layer", 2, 2),
        ("deepseek v2", 2, 1),
        ("deepseek v2, no latent query", 4, 1),
        ("deepseek v2", 2, 2),
        ("deepseek v3", 2, 1),
        ("deepseek v3", 4, 1),
        ("deepseek v3", 1, 2),
        ("deepseek v3", 2, 2),
    ],
)
def test_ranks_give_what_one_process_gives(
    ranks: RankPool, folder: Path, name: str, tensor: int, expert: int
) -> None:
    model = folder / name
    if not model.exists():
        save_variant(model, MODELS[name])
    token_ids = tokens(50)
    with ranks.engine(model, Parallelism()) as engine:
        expected, answers = score(engine, token_ids, [33, 1, 16]), greedy(engine)
    with ranks.engine(model, Parallelism(tensor, expert)) as engine:
        out = score(engine, token_ids, [33, 1, 16])
        assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-5
        assert greedy(engine) == answers


def test_real_model_on_three_ranks_answers_as_on_one(ranks: RankPool) -> None:
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    question = tokenizer.encode(text).ids
    answers = []
    for parallel in (Parallelism(), Parallelism(3)):
        with ranks.engine(DEFAULT_MODEL, parallel) as engine:
            answers.append(generate(engine, prompt(question), 8, chunk=9))
    assert answers[0] == answers[1]
    assert tokenizer.decode(answers[0][:-1]) == "The capital of France is Paris."


def test_bfloat16_on_ranks_is_as_near_to_float32_as_on_one(ranks: RankPool, folder: Path) -> None:
    model, token_ids = folder / "qwen3", tokens(50)
    if not model.exists():
        save_variant(model, MODELS["qwen3"])
    logits: dict[tuple[str, int], torch.Tensor] = {}
    for dtype, size in (("float32", 1), ("bfloat16", 1), ("bfloat16", 4)):
        with ranks.engine(model, Parallelism(size), dtype=dtype) as engine:
            logits[dtype, size] = score(engine, token_ids, [50])
    exact = logits["float32", 1]
    errors = [
        ((logits["bfloat16", size] - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
        for size in (1, 4)
    ]
    assert errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_rank_keeps_its_part_in_8_bits(ranks: RankPool, folder: Path, name: str) -> None:
    model, token_ids = folder / name, tokens(50)
    if not model.exists():
        save_variant(model, MODELS[name])
    with ranks.engine(model, Parallelism()) as engine:
        exact = score(engine, token_ids, [50])
    for parallel in (Parallelism(), Parallelism(2)):
        with ranks.engine(model, parallel, quantization="int8") as engine:
            error = (score(engine, token_ids, [50]) - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.1
