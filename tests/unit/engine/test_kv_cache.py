"""What a sequence holds of the pool: prefixes, room, publishing, giving back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.tiny_engine import DOMAIN, prompt

from baton.kv_layout import KvLayout
from engine.kv_cache.block_pool import BlockCounts
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Sequence

LAYOUT = KvLayout(8, 2, 2, 4, 8, "float32")


@pytest.fixture
def kv() -> Iterator[KvCache]:
    cache = KvCache(LAYOUT, memoryview(bytearray(LAYOUT.num_bytes)), DOMAIN)
    yield cache
    cache.pool.check()


def compute(kv: KvCache, seq: Sequence, num_tokens: int) -> None:
    """Stands in for the engine: the KV of the first ``num_tokens`` tokens is there."""
    assert kv.ensure_blocks(seq, num_tokens)
    seq.num_computed_tokens = num_tokens
    kv.publish(seq)


def test_tensor_is_a_view_of_the_given_memory() -> None:
    memory = bytearray(LAYOUT.num_bytes)
    kv = KvCache(LAYOUT, memoryview(memory), DOMAIN)
    kv.tensor[3, 1, 0, 1, 2, 5] = 1.5
    strides = LAYOUT.strides
    at = sum(i * s for i, s in zip((3, 1, 0, 1, 2, 5), strides, strict=True))
    assert torch.frombuffer(memory, dtype=torch.float32, offset=at, count=1).item() == 1.5
    assert kv.tensor.shape == LAYOUT.shape


def test_only_full_computed_blocks_are_found(kv: KvCache) -> None:
    first = prompt(list(range(11)))
    compute(kv, first, 7)
    other = prompt(list(range(11)))
    assert kv.num_cached_prefix(other) == 4
    compute(kv, first, 11)
    assert kv.num_cached_prefix(other) == 8
    assert kv.hold_prefix(other) == 8
    assert other.block_table == first.block_table[:2]
    assert (other.num_computed_tokens, other.num_shared_tokens, other.num_cached_tokens) == (8,) * 3
    kv.free(first)
    kv.free(other)
    assert kv.pool.counts() == BlockCounts(free=6, cached=2, referenced=0, quarantined=0)


def test_a_prefix_ends_at_the_first_differing_block(kv: KvCache) -> None:
    compute(kv, prompt(list(range(12))), 12)
    assert kv.hold_prefix(prompt([0, 1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11])) == 4
    assert kv.hold_prefix(prompt([99, 1, 2, 3, 4, 5, 6, 7])) == 0


def test_equal_tokens_after_another_prefix_are_another_block(kv: KvCache) -> None:
    seq = prompt([1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2])
    compute(kv, seq, 12)
    assert seq.block_hashes == DOMAIN.chain(seq.root_hash, seq.token_ids, 4)
    assert kv.hold_prefix(prompt([2, 2, 2, 2])) == 0


def test_sequences_of_different_roots_share_nothing(kv: KvCache) -> None:
    compute(kv, prompt(list(range(8))), 8)
    other = prompt(list(range(8)))
    other.root_hash = DOMAIN.root(cache_salt="tenant")
    assert kv.hold_prefix(other) == 0


def test_a_fully_cached_input_leaves_only_its_last_token(kv: KvCache) -> None:
    compute(kv, prompt(list(range(8))), 8)
    other = prompt(list(range(8)))
    assert kv.hold_prefix(other) == 8
    assert other.num_remaining == 1
    assert other.num_shared_tokens == other.num_cached_tokens == 8
    assert len(other.block_table) == 2


def test_generated_tokens_are_published_too(kv: KvCache) -> None:
    seq = prompt([1, 2, 3])
    compute(kv, seq, 3)
    seq.token_ids += [4, 5]
    compute(kv, seq, 4)
    assert kv.num_cached_prefix(prompt([1, 2, 3, 4, 9])) == 4


def test_no_room_changes_nothing(kv: KvCache) -> None:
    first, second = prompt([1] * 24), prompt([2] * 12)
    assert kv.ensure_blocks(first, 24)
    assert kv.ensure_blocks(second, 8)
    before = kv.pool.counts()
    table = list(second.block_table)
    assert not kv.ensure_blocks(second, 9)
    assert (kv.pool.counts(), second.block_table) == (before, table)


def test_new_blocks_are_zeroed_so_that_no_garbage_is_read(kv: KvCache) -> None:
    kv.tensor.fill_(torch.nan)
    seq = prompt([1] * 10)
    assert kv.ensure_blocks(seq, 10)
    assert not kv.tensor[seq.block_table].any()
    assert kv.tensor[LAYOUT.scratch_block].isnan().all()


def test_held_blocks_keep_their_content(kv: KvCache) -> None:
    first = prompt(list(range(8)))
    compute(kv, first, 8)
    kv.tensor[first.block_table] = 3.0
    kv.free(first)
    second = prompt([*range(8), 50])
    kv.hold_prefix(second)
    assert kv.ensure_blocks(second, 9)
    assert (kv.tensor[second.block_table[:2]] == 3.0).all()


def test_a_sequence_head_outlives_its_tail_under_eviction(kv: KvCache) -> None:
    first = prompt(list(range(16)))
    compute(kv, first, 16)
    kv.free(first)
    assert kv.ensure_blocks(prompt([77] * 24), 24)
    assert kv.num_cached_prefix(prompt(list(range(16)))) == 8


def test_adopt_publishes_what_was_received(kv: KvCache) -> None:
    first = prompt(list(range(8)))
    compute(kv, first, 8)
    seq = prompt(list(range(14)))
    assert kv.hold_prefix(seq) == 8
    assert kv.ensure_blocks(seq, 14)
    kv.adopt(seq, 14)
    assert seq.num_remaining == 0
    assert kv.num_cached_prefix(prompt(list(range(14)))) == 12


def test_adopt_of_a_fully_held_input_needs_no_recomputation(kv: KvCache) -> None:
    compute(kv, prompt(list(range(8))), 8)
    seq = prompt(list(range(8)))
    kv.hold_prefix(seq)
    kv.adopt(seq, 8)
    assert seq.num_remaining == 0


def test_quarantine_keeps_own_blocks_apart_and_releases_shared_ones(kv: KvCache) -> None:
    first = prompt(list(range(8)))
    compute(kv, first, 8)
    seq = prompt(list(range(14)))
    kv.hold_prefix(seq)
    assert kv.ensure_blocks(seq, 14)
    own = seq.block_table[2:]
    assert kv.quarantine(seq) == own
    assert seq.block_table == []
    assert kv.pool.counts() == BlockCounts(free=4, cached=0, referenced=2, quarantined=2)
    kv.pool.end_quarantine(own)
    kv.free(first)
    assert kv.pool.counts() == BlockCounts(free=6, cached=2, referenced=0, quarantined=0)


def test_a_prefix_grows_by_what_others_publish_and_own_blocks_go_back(kv: KvCache) -> None:
    first, second = prompt(list(range(12))), prompt([*range(12), 50])
    assert kv.ensure_blocks(first, 12)
    assert kv.ensure_blocks(second, 13)
    last = second.block_table[3]
    compute(kv, first, 8)
    assert kv.extend_prefix(second) == 8
    assert second.block_table[:2] == first.block_table[:2]
    assert kv.pool.counts() == BlockCounts(free=3, cached=0, referenced=5, quarantined=0)
    compute(kv, first, 12)
    assert kv.extend_prefix(second) == 4
    assert second.block_table == [*first.block_table, last]
    assert second.num_shared_tokens == second.num_computed_tokens == second.num_cached_tokens == 12
    kv.free(first)
    kv.free(second)
    assert kv.pool.counts() == BlockCounts(free=5, cached=3, referenced=0, quarantined=0)


def test_a_block_that_is_begun_is_not_exchanged(kv: KvCache) -> None:
    first, second = prompt(list(range(8))), prompt([*range(8), 50])
    compute(kv, second, 2)
    assert kv.ensure_blocks(second, 9)
    table = list(second.block_table)
    compute(kv, first, 8)
    assert kv.extend_prefix(second) == 0
    assert second.block_table == table
    compute(kv, second, 4)
    assert kv.extend_prefix(second) == 4
    assert second.block_table == [table[0], first.block_table[1], table[2]]


def test_an_input_that_others_compute_to_its_end_keeps_its_last_token_to_compute(
    kv: KvCache,
) -> None:
    first, second = prompt(list(range(8))), prompt(list(range(8)))
    assert kv.ensure_blocks(second, 8)
    compute(kv, first, 8)
    assert kv.next_block_hash(second) == first.block_hashes[0]
    assert kv.extend_prefix(second) == 7
    assert (second.num_remaining, second.num_shared_tokens) == (1, 8)
    assert kv.next_block_hash(second) is None
    assert kv.extend_prefix(second) == 0
