"""Which part of a model each rank takes: together everything, and nothing twice that is summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_engine import model_config
from support.tiny_models import TinyLlama

from baton.checkpoint.decoder_parts import DecoderParts, LatentConfig, MoeConfig
from baton.checkpoint.model_config import ModelConfig
from baton.config import BatonConfig
from baton.errors import ConfigurationError
from baton.parallelism import Parallelism, check_parallelism, valid_num_ranks
from engine import setup
from engine.models.decoder import Decoder
from engine.parallel.group import ParallelGroup, RankGroups
from engine.parallel.shard import Shard, part
from engine.setup import plan_engine
from engine.weights.dummy import dummy_tensors
from engine.weights.on_demand import OnDemand

_TINY = model_config(TinyLlama())


def config(num_heads: int, num_kv_heads: int, *, num_experts: int = 0) -> ModelConfig:
    moe = MoeConfig(num_experts, 1, 640, True) if num_experts else None
    return replace(
        _TINY,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=641,
        parts=DecoderParts(moe=moe),
    )


@st.composite
def heads_and_shards(draw: st.DrawFn) -> tuple[ModelConfig, list[Shard]]:
    """A model and all ranks of a degree that is valid for it."""
    num_kv_heads = draw(st.integers(1, 16))
    model = config(num_kv_heads * draw(st.integers(1, 8)), num_kv_heads)
    size = draw(st.sampled_from(valid_num_ranks(model)))
    return model, [Shard(Parallelism(size), rank) for rank in range(size)]


@given(heads_and_shards())
def test_every_query_head_is_on_one_rank_with_its_kv_head(
    model_and_shards: tuple[ModelConfig, list[Shard]],
) -> None:
    model, shards = model_and_shards
    group = model.num_heads // model.num_kv_heads
    seen: list[int] = []
    read: set[int] = set()
    for shard in shards:
        query, keys = shard.query_heads(model), shard.kv_heads(model)
        own_group = (query.stop - query.start) / (keys.stop - keys.start)
        assert own_group.is_integer()
        for local, head in enumerate(range(query.start, query.stop)):
            assert keys.start + local // int(own_group) == head // group
        seen += range(query.start, query.stop)
        read |= set(range(keys.start, keys.stop))
    assert seen == list(range(model.num_heads))
    assert read == set(range(model.num_kv_heads))


@given(heads_and_shards())
def test_kv_heads_are_replicated_only_where_there_are_fewer_than_ranks(
    model_and_shards: tuple[ModelConfig, list[Shard]],
) -> None:
    model, shards = model_and_shards
    held = [shard.kv_heads(model) for shard in shards]
    num_held = sum(keys.stop - keys.start for keys in held)
    assert num_held == max(model.num_kv_heads, len(shards))


@given(st.integers(0, 500), st.integers(1, 40))
def test_parts_are_everything_once_and_nearly_equal(num: int, size: int) -> None:
    parts = [part(num, size, index) for index in range(size)]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(num))
    lengths = {p.stop - p.start for p in parts}
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 500), st.integers(1, 16))
def test_vocabulary_needs_padding_at_its_end_alone(vocab_size: int, size: int) -> None:
    parts = [Shard(Parallelism(size), rank).vocabulary(vocab_size) for rank in range(size)]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(vocab_size))
    width = -(-vocab_size // size)
    assert all(p.start == min(rank * width, vocab_size) for rank, p in enumerate(parts))


@pytest.mark.parametrize(("tensor", "expert"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_each_experts_features_are_once_in_its_group(tensor: int, expert: int) -> None:
    seen: list[tuple[int, int]] = []
    for rank in range(tensor * expert):
        shard = Shard(Parallelism(tensor, expert), rank)
        inner = shard.expert_inner(41)
        seen += [(e, f) for e in shard.experts(8 * expert) for f in range(inner.start, inner.stop)]
    assert sorted(seen) == [(e, f) for e in range(8 * expert) for f in range(41)]


def test_rank_takes_each_tensor_once_and_none_of_anothers_experts() -> None:
    model, asked = config(8, 8, num_experts=6), list[str]()
    dummies = dummy_tensors(model, torch.float32)

    def noted(name: str) -> torch.Tensor:
        asked.append(name)
        return dummies[name]

    second = ParallelGroup(1, 2, object())
    groups = RankGroups(Shard(Parallelism(1, 2), 1), world=second, experts=second)
    Decoder(model, OnDemand(dummies, noted), groups)
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in asked if "experts" in name}
    assert experts == {3, 4, 5}
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "valid"),
    [(9, 3, [1, 3, 9]), (32, 8, [1, 2, 4, 8, 16, 32]), (12, 4, [1, 2, 4, 12]), (7, 1, [1, 7])],
)
def test_valid_degrees_divide_or_replicate_the_heads(
    num_heads: int, num_kv_heads: int, valid: list[int]
) -> None:
    assert valid_num_ranks(config(num_heads, num_kv_heads)) == valid


@given(st.integers(1, 200))
def test_valid_degrees_leave_every_rank_rows_of_the_vocabulary(vocab_size: int) -> None:
    model = replace(config(120, 1), vocab_size=vocab_size)
    valid = valid_num_ranks(model)
    for size in (size for size in range(1, 121) if 120 % size == 0):
        parts = [Shard(Parallelism(size), rank).vocabulary(vocab_size) for rank in range(size)]
        assert all(part.stop > part.start for part in parts) == (size in valid)


@pytest.mark.parametrize(
    ("model", "parallel", "said"),
    [
        (config(9, 3), Parallelism(2), "9 query heads and 3 KV heads; valid: 1, 3, 9"),
        (config(12, 4), Parallelism(3), "valid: 1, 2, 4, 12"),
        (
            replace(config(8, 8), vocab_size=9),
            Parallelism(4),
            "size 4 leaves a rank without a part of the 9 rows .*vocabulary.*; valid: 1, 2$",
        ),
        (config(8, 8), Parallelism(1, 2), "the model has no experts; valid: 1"),
        (config(8, 8, num_experts=6), Parallelism(1, 4), "has 6 experts; valid: 1, 2, 3, 6"),
        (
            config(8, 4, num_experts=6),
            Parallelism(3, 2),
            "3 × expert_parallel_size 2 does not .*beside it for tensor_parallel_size: 1, 2, 4",
        ),
        (
            config(8, 4, num_experts=6),
            Parallelism(1, 3),
            "valid beside it for tensor_parallel_size: none",
        ),
    ],
)
def test_degrees_that_cannot_be_are_refused_with_those_that_can(
    model: ModelConfig, parallel: Parallelism, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"pools\.decode: .*{said}"):
        check_parallelism(model, parallel, where="pools.decode")


def test_latent_attention_splits_its_heads_and_every_rank_reads_the_one_that_is_cached() -> None:
    model = replace(config(6, 1), parts=DecoderParts(latent=LatentConfig(None, 32, 16, 8, 12)))
    assert valid_num_ranks(model) == [1, 2, 3, 6]
    shards = [Shard(Parallelism(3), rank) for rank in range(3)]
    assert [shard.query_heads(model) for shard in shards] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [shard.kv_heads(model) for shard in shards] == [slice(0, 1)] * 3
    with pytest.raises(ConfigurationError, match=r"6 query heads.*valid: 1, 2, 3, 6"):
        check_parallelism(model, Parallelism(4), where="pools.decode")


@pytest.mark.parametrize("parallel", [Parallelism(1, 1), Parallelism(4, 2), Parallelism(1, 2)])
def test_degrees_that_fit_are_taken(parallel: Parallelism) -> None:
    check_parallelism(config(8, 4, num_experts=6), parallel, where="pools.decode")


def test_worker_refuses_degrees_that_its_model_cannot_be_split_over() -> None:
    with pytest.raises(ConfigurationError, match=r"smollm2.* valid: 1, 3, 9"):
        plan_engine(BatonConfig(), secret="s", parallel=Parallelism(2))


def test_ranks_share_one_workers_memory_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda _: set(range(7)))
    one, three = (plan_engine(BatonConfig(), secret="s", parallel=Parallelism(n)) for n in (1, 3))
    assert one.layout == three.layout
    assert one.digest == three.digest
    assert (one.threads, three.threads) == (7, 2)
