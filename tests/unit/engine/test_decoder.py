"""The model's logits equal those of transformers, however its tokens are scheduled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_engine import DOMAIN, TINY, kv_layout, model_config, prompt, tokens
from support.tiny_models import TinyLlama, config_json, tiny_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.interface import Attention
from engine.attention.paged_cpu import PagedCpuAttention
from engine.attention.reference import ReferenceAttention
from engine.batch import build_batch
from engine.kv_cache.kv_cache import KvCache
from engine.models.decoder import Decoder
from engine.sequence import Scheduled, Sequence

VARIANTS = {
    "grouped": TINY,
    "one query head per KV head": TinyLlama(num_heads=4, num_kv_heads=4),
    "three query heads per KV head": TinyLlama(hidden_size=96, num_heads=6, num_kv_heads=2),
    "head_dim of its own": TinyLlama(num_heads=4, num_kv_heads=2, head_dim=24),
    "own head": replace(TINY, tie_word_embeddings=False),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "other theta": replace(TINY, rope_theta=500.0),
}


class Runner:
    """A model with a pool, and every row's logits."""

    def __init__(self, variant: TinyLlama, *, reference: bool = False) -> None:
        config = model_config(variant)
        layout = kv_layout(config, num_blocks=40, block_size=8)
        self.kv = KvCache(layout, memoryview(bytearray(layout.num_bytes)), DOMAIN)
        self.model = Decoder(config, tiny_tensors(variant))
        self.attention: Attention = (
            ReferenceAttention(layout, self.kv.tensor)
            if reference
            else PagedCpuAttention(layout, self.kv.tensor, config.num_heads)
        )

    @torch.inference_mode()
    def logits(self, *parts: tuple[Sequence, int]) -> list[torch.Tensor]:
        """Computes the next tokens of each sequence; their logits, [num_tokens, vocabulary]."""
        for seq, num_tokens in parts:
            assert self.kv.ensure_blocks(seq, seq.num_computed_tokens + num_tokens)
        batch = build_batch([Scheduled(*part) for part in parts], self.kv.layout)
        all_rows = torch.arange(len(batch.token_ids))
        rows = self.model.forward(
            batch.token_ids, batch.positions, all_rows, self.attention.begin(batch)
        ).values
        starts = {span.num_context: span.first_row for span in batch.spans}
        assert len(starts) == len(parts), "contexts of one length would be ambiguous"
        out = []
        for seq, num_tokens in parts:
            seq.num_computed_tokens += num_tokens
            first = starts[seq.num_computed_tokens]
            out.append(rows[first : first + num_tokens])
        return out

    def all_logits(self, token_ids: list[int], chunk: int) -> torch.Tensor:
        seq = prompt(token_ids)
        rows = []
        while seq.num_remaining:
            rows += self.logits((seq, min(chunk, seq.num_remaining)))
        return torch.cat(rows)


def oracle(variant: TinyLlama, token_ids: list[int]) -> torch.Tensor:
    model = LlamaForCausalLM(LlamaConfig(**config_json(variant))).eval()
    tensors = tiny_tensors(variant)
    missing, surplus = model.load_state_dict(tensors, strict=False)
    assert not surplus
    assert set(missing) <= {"lm_head.weight"}
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert out.dtype == torch.float32
    assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(variant: TinyLlama) -> None:
    token_ids = tokens(45)
    assert_close(Runner(variant).all_logits(token_ids, 45), oracle(variant, token_ids))


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("chunk", [1, 3, 8, 13])
def test_logits_do_not_depend_on_chunks(num_tokens: int, chunk: int) -> None:
    token_ids = tokens(num_tokens)
    assert_close(Runner(TINY).all_logits(token_ids, chunk), oracle(TINY, token_ids))


def test_long_context_across_several_products_equals_transformers() -> None:
    token_ids = tokens(300)
    assert_close(Runner(TINY).all_logits(token_ids, 170), oracle(TINY, token_ids))


def test_sequences_packed_into_one_step_do_not_mix() -> None:
    runner = Runner(TINY)
    texts = [tokens(length, seed=length) for length in (21, 30, 12)]
    first, second, third = (prompt(text) for text in texts)
    got: dict[Sequence, list[torch.Tensor]] = {first: [], second: [], third: []}
    for step in (
        [(first, 20)],
        [(first, 1), (second, 11)],
        [(second, 18), (third, 5)],
        [(third, 6), (second, 1)],
        [(third, 1)],
    ):
        for (seq, _), rows in zip(step, runner.logits(*step), strict=True):
            got[seq].append(rows)
    for rows, text in zip(got.values(), texts, strict=True):
        assert_close(torch.cat(rows), oracle(TINY, text))


def test_the_reference_attention_serves_the_model_too() -> None:
    token_ids = tokens(20)
    out = Runner(TINY, reference=True).all_logits(token_ids, 9)
    assert_close(out, oracle(TINY, token_ids))


def test_no_row_asked_for_gives_no_logits_but_writes_kv() -> None:
    runner = Runner(TINY)
    seq = prompt(tokens(9))
    assert runner.kv.ensure_blocks(seq, 9)
    batch = build_batch([Scheduled(seq, 9)], runner.kv.layout)
    none = torch.empty(0, dtype=torch.int64)
    logits = runner.model.forward(
        batch.token_ids, batch.positions, none, runner.attention.begin(batch)
    )
    assert logits.values.shape == (0, runner.model.vocab_size)
    assert runner.kv.tensor[seq.block_table[0]].all()
