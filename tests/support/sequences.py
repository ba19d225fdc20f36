"""A small KV cache, and an engine's step without a model, for schedulers' tests."""

from __future__ import annotations

from collections.abc import Sequence as Items

from baton.block_hash import HashDomain
from baton.kv_layout import KvLayout
from engine.kv_cache.kv_cache import KvCache
from engine.sampling.params import SamplingParams
from engine.sequence import Scheduled, Sequence

DOMAIN = HashDomain(key=b"test", weights_revision="r", kv_dtype="float32")


def small_cache(num_blocks: int, block_size: int = 4) -> KvCache:
    layout = KvLayout(num_blocks, 1, 1, block_size, 2, "float32")
    return KvCache(layout, memoryview(bytearray(layout.num_bytes)), DOMAIN)


def sequence(key: object, token_ids: list[int], num_prompt_tokens: int | None = None) -> Sequence:
    return Sequence(
        key=key,  # type: ignore[arg-type]
        token_ids=list(token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=SamplingParams(seed=0),
        root_hash=DOMAIN.root(),
    )


def pretend_step(kv: KvCache, chunks: Items[Scheduled], token_id: int) -> list[Sequence]:
    """What Engine.step does to sequences, every sampled token being ``token_id``."""
    sampled = []
    for chunk in chunks:
        seq = chunk.seq
        assert 0 < chunk.num_tokens <= seq.num_remaining
        end = seq.num_computed_tokens + chunk.num_tokens
        assert kv.layout.num_blocks_for(end) <= len(seq.block_table), "a token without a slot"
        seq.num_computed_tokens = end
        kv.publish(seq)
        if seq.num_remaining == 0:
            seq.token_ids.append(token_id)
            sampled.append(seq)
    return sampled
