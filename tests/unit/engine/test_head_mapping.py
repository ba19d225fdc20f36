"""Invariant 6 of the hand-off: for every pair of degrees, the KV heads that a prefill worker's
ranks write into its pool are those that a decode worker's ranks read from theirs, every head
written by exactly the ranks that are declared to; other degrees are refused at start.

Blocks are handed over whole, so a pair is right where each side covers the heads by itself, and
both mean the same rows of a block. Rows are those of the attention that writes and reads them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_engine import model_config
from support.tiny_models import TinyLlama

from baton import parallelism
from baton.checkpoint.decoder_parts import DecoderParts, LatentConfig
from baton.checkpoint.model_config import ModelConfig
from baton.errors import ConfigurationError
from baton.kv_layout import KvLayout
from baton.parallelism import Parallelism, check_parallelism
from engine.attention.paged_cpu import attention_of
from engine.parallel.group import RankGroups
from engine.parallel.shard import Shard

MOST = 64
WIDE = {"vocab_size": 8192, "intermediate_size": 8192}
"""Enough for every degree: only heads decide."""
LATENT = DecoderParts(latent=LatentConfig(None, 32, 16, 8, 12))
_TINY = model_config(TinyLlama())


def model(num_heads: int, num_kv_heads: int, *, latent: bool = False) -> ModelConfig:
    """One layer, so that a block's rows are its heads; with latent attention one is cached."""
    parts = LATENT if latent else DecoderParts()
    num_kv_heads = 1 if latent else num_kv_heads
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_layers": 1, **WIDE}
    return replace(_TINY, parts=parts, **sizes)


@st.composite
def models(draw: st.DrawFn, most_heads: int = 8 * MOST) -> ModelConfig:
    num_kv_heads = draw(st.integers(1, MOST))
    group = draw(st.integers(1, max(1, most_heads // num_kv_heads)))
    return model(group * num_kv_heads, num_kv_heads, latent=draw(st.booleans()))


def fits(config: ModelConfig, degree: int) -> bool:
    """As DESIGN.md has it."""
    num = config.num_kv_heads
    return config.num_heads % degree == 0 and (num % degree == 0 or degree % num == 0)


def valid(config: ModelConfig) -> list[int]:
    return [degree for degree in range(1, MOST + 1) if fits(config, degree)]


def shards(shard: type[Shard], degree: int) -> list[Shard]:
    return [shard(Parallelism(degree), rank) for rank in range(degree)]


# ------------------------------------------------------------- what each rank does to a block


def pool_of(config: ModelConfig) -> tuple[KvLayout, torch.Tensor]:
    layout = config.kv_layout(num_blocks=1, block_size=1, dtype="float32")
    return layout, torch.zeros(layout.shape)


def head_rows(config: ModelConfig, head: int) -> set[int]:
    """Of block 0, whose rows are [kv_head][part] in ``KvLayout``."""
    num_parts = pool_of(config)[0].num_kv_parts
    return {head * num_parts + part for part in range(num_parts)}


def rows_written(config: ModelConfig, rank: Shard) -> list[int]:
    attention = attention_of(config, *pool_of(config), RankGroups(rank))
    return attention.token_rows(torch.tensor([0])).view(-1).tolist()


def rows_read(config: ModelConfig, rank: Shard) -> dict[int, set[int]]:
    """By query head."""
    attention = attention_of(config, *pool_of(config), RankGroups(rank))
    num_parts = attention.layout.num_kv_parts
    rows = attention.block_rows(torch.tensor([[0]]))[0].view(num_parts, -1)
    query = rank.query_heads(config)
    group = (query.stop - query.start) // rows.shape[1]
    assert group * rows.shape[1] == query.stop - query.start, "a group of heads is cut"
    local = enumerate(range(query.start, query.stop))
    return {head: set(rows[:, index // group].tolist()) for index, head in local}


def check_pair(config: ModelConfig, prefill: int, decode: int, shard: type[Shard] = Shard) -> None:
    writers: dict[int, list[int]] = {}
    for rank, writer in enumerate(shards(shard, prefill)):
        for row in rows_written(config, writer):
            writers.setdefault(row, []).append(rank)
    # Replicas stand side by side: all of them compute the same bytes and write the same place.
    num_replicas = max(1, prefill // config.num_kv_heads)
    declared = {
        row: [
            rank
            for rank in range(prefill)
            if (rank // num_replicas) == head * min(prefill, config.num_kv_heads)
            // config.num_kv_heads
        ]
        for head in range(config.num_kv_heads)
        for row in head_rows(config, head)
    }  # fmt: skip
    assert writers == declared, "a head is written by other ranks than are declared to"
    read: dict[int, set[int]] = {}
    for reader in shards(shard, decode):
        found = rows_read(config, reader)
        assert not read.keys() & found.keys(), "two ranks compute one query head"
        read |= found
    group = config.num_heads // config.num_kv_heads
    expected = {head: head_rows(config, head // group) for head in range(config.num_heads)}
    assert read == expected, "a query head reads another's keys"
    assert set().union(*read.values()) == writers.keys(), "decode reads what nobody wrote"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), config=models())
def test_heads_written_by_any_prefill_degree_are_those_read_by_any_decode_degree(
    data: st.DataObject, config: ModelConfig
) -> None:
    degrees = st.sampled_from(valid(config))
    check_pair(config, data.draw(degrees), data.draw(degrees))


def check_covered(config: ModelConfig, degree: int, shard: type[Shard] = Shard) -> None:
    """The same as ``check_pair`` from the slices alone: thousands in a second."""
    query_seen: list[int] = []
    held = [0] * config.num_kv_heads
    group = config.num_heads // config.num_kv_heads
    for rank in shards(shard, degree):
        query, keys = rank.query_heads(config), rank.kv_heads(config)
        needed = {head // group for head in range(query.start, query.stop)}
        assert needed == set(range(keys.start, keys.stop)), "more or other heads than it reads"
        query_seen += range(query.start, query.stop)
        for head in needed:
            held[head] += 1
    assert query_seen == list(range(config.num_heads)), "query heads are not covered once"
    assert set(held) == {max(1, degree // config.num_kv_heads)}, "replicas are uneven"


@settings(max_examples=300, deadline=None)
@given(config=models(most_heads=1024))
def test_every_valid_degree_covers_all_heads_as_often_as_declared(config: ModelConfig) -> None:
    for degree in valid(config):
        check_covered(config, degree)


def is_taken(config: ModelConfig, degree: int) -> bool:
    try:
        check_parallelism(config, Parallelism(degree), where="pools.decode")
    except ConfigurationError:
        return False
    return True


def check_refusals(config: ModelConfig) -> None:
    taken = [degree for degree in range(1, MOST + 1) if is_taken(config, degree)]
    assert taken == valid(config)


@settings(max_examples=200, deadline=None)
@given(config=models(most_heads=1024))
def test_degrees_are_refused_at_start_exactly_where_heads_do_not_fit(config: ModelConfig) -> None:
    check_refusals(config)


# ------------------------------------------------------------------------------ mutants


class OffByOne(Shard):
    def kv_heads(self, config: ModelConfig) -> slice:
        heads = super().kv_heads(config)
        last = heads.stop == config.num_kv_heads
        return heads if last else slice(heads.start + 1, heads.stop + 1)


class SkipsReplicas(Shard):
    """Gives replicas the next heads, as if there were as many as ranks."""

    def kv_heads(self, config: ModelConfig) -> slice:
        first = self.rank % config.num_kv_heads
        replicated = self.num_ranks > config.num_kv_heads
        return slice(first, first + 1) if replicated else super().kv_heads(config)


class HoldsAllHeads(Shard):
    """Every rank writes and reads all heads where they are replicated."""

    def kv_heads(self, config: ModelConfig) -> slice:
        replicated = self.num_ranks > config.num_kv_heads
        return slice(0, config.num_kv_heads) if replicated else super().kv_heads(config)


class LeavesOutTheLast(Shard):
    def query_heads(self, config: ModelConfig) -> slice:
        heads = super().query_heads(config)
        is_last = self.rank == self.num_ranks - 1 and heads.stop - heads.start > 1
        return slice(heads.start, heads.stop - 1) if is_last else heads


class InterleavesQueries(Shard):
    """Ranks' query heads are shifted against their KV heads."""

    def query_heads(self, config: ModelConfig) -> slice:
        other = replace(self, rank=(self.rank + 1) % self.num_ranks)
        return Shard.query_heads(other, config)


def pairs() -> list[tuple[ModelConfig, int, int]]:
    return [(c, p, d) for c in FITTING for p in valid(c)[:4] for d in valid(c)[:4]]


def test_pairs_that_kill_mutants_are_right_without_them() -> None:
    for config, prefill, decode in pairs():
        check_pair(config, prefill, decode)


FITTING = [model(9, 3), model(32, 8), model(64, 64), model(12, 4), model(16, 1, latent=True)]


@pytest.mark.parametrize(
    "mutant", [OffByOne, SkipsReplicas, HoldsAllHeads, LeavesOutTheLast, InterleavesQueries]
)
def test_mutant_of_the_mapping_is_killed(mutant: type[Shard]) -> None:
    with pytest.raises(AssertionError):
        for config, prefill, decode in pairs():
            check_pair(config, prefill, decode, mutant)
    with pytest.raises(AssertionError):
        for config in FITTING:
            for degree in valid(config):
                check_covered(config, degree, mutant)


def splits_unevenly(config: ModelConfig, num: int) -> bool:
    return config.num_heads % num == 0


def does_not_replicate(config: ModelConfig, num: int) -> bool:
    return config.num_heads % num == 0 and config.num_kv_heads % num == 0


def cuts_query_heads(config: ModelConfig, num: int) -> bool:
    return config.num_kv_heads % num == 0 or num % config.num_kv_heads == 0


@pytest.mark.parametrize("mutant", [splits_unevenly, does_not_replicate, cuts_query_heads])
def test_mutant_of_the_refusal_is_killed(mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [model(9, 3), model(12, 4), model(32, 8)]
    for config in configs:
        check_refusals(config)
    monkeypatch.setattr(parallelism, "_splits_heads", mutant)
    with pytest.raises(AssertionError):
        for config in configs:
            check_refusals(config)
