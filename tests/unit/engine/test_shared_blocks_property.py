"""Invariant 7 of the hand-off, the engine's part: of an input that is held to its end only the
last token is computed again, and no step ever writes into a block that is shared.

Sequences with prefixes in common hold, extend, compute and free blocks of a real cache; the slots
of each step are those that a model would write.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sequences import sequence, small_cache

from engine import batch
from engine.batch import build_batch
from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Scheduled, Sequence

BLOCK_SIZE, NUM_BLOCKS = 4, 24


class Steps:
    def __init__(self, cache: type[KvCache] = KvCache) -> None:
        self.kv = small_cache(NUM_BLOCKS, BLOCK_SIZE)
        self.kv.__class__ = cache
        self.live: list[Sequence] = []
        self.seen: Counter[str] = Counter()

    def begin(self, num_common: int, num_own: int, branch: int) -> None:
        token_ids = [*range(num_common), *[90 + branch] * num_own]
        seq = sequence(len(self.live), token_ids)
        num_held = self.kv.hold_prefix(seq)
        if not self.kv.ensure_blocks(seq, seq.num_tokens):
            self.kv.free(seq)
            return
        if num_held == len(token_ids):
            assert seq.num_remaining == 1, "more than the last token of what is held"
            self.seen["held to the end"] += 1
        self.live.append(seq)

    def step(self, sizes: list[int]) -> None:
        chunks = []
        for seq, size in zip(self.live, sizes, strict=False):
            self.kv.extend_prefix(seq)
            chunks.append(Scheduled(seq, min(size, seq.num_remaining)))
        if not chunks:
            return
        slots = build_batch(chunks, self.kv.layout).slot_mapping.tolist()
        written = [slot // BLOCK_SIZE for slot in slots]
        pool = self.kv.pool
        for block in set(written) - {self.kv.layout.scratch_block}:
            assert pool._num_references[block] == 1, "a block of several is written"
            assert pool._hashes[block] is None, "a published block is written"
        to_own = [slot for slot in slots if slot // BLOCK_SIZE != self.kv.layout.scratch_block]
        assert len(to_own) == len(set(to_own)), "two tokens share a slot"
        self.seen["written to scratch"] += len(slots) - len(to_own)
        for chunk in chunks:
            chunk.seq.num_computed_tokens += chunk.num_tokens
            self.kv.publish(chunk.seq)
            if chunk.seq.num_remaining == 0:
                self.kv.free(chunk.seq)
                self.live.remove(chunk.seq)

    def play(self, dice: random.Random) -> Counter[str]:
        for _ in range(dice.randrange(5, 40)):
            if len(self.live) < 4 and dice.random() < 0.5:
                own = dice.choice((0, 0, 1, 3, 4))
                self.begin(BLOCK_SIZE * dice.randint(1, 4), own, dice.randrange(2))
            else:
                self.step([dice.randint(1, 9) for _ in self.live])
        self.kv.pool.check()
        return self.seen


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_step_writes_into_a_shared_block(dice: random.Random) -> None:
    Steps().play(dice)


def random_plays(num: int, cache: type[KvCache] = KvCache) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(num):
        seen += Steps(cache).play(random.Random(seed))
    return seen


def test_random_steps_do_recompute_what_is_held_to_its_end() -> None:
    seen = random_plays(300)
    assert min(seen["held to the end"], seen["written to scratch"]) > 100, seen


class RecomputesTheLastBlock(KvCache):
    def hold_prefix(self, seq: Sequence) -> int:
        num_held = super().hold_prefix(seq)
        if num_held == seq.num_tokens:
            seq.num_computed_tokens = num_held - BLOCK_SIZE
        return num_held


class ForgetsWhatIsShared(KvCache):
    def hold_prefix(self, seq: Sequence) -> int:
        num_held = super().hold_prefix(seq)
        seq.num_shared_tokens = 0
        return num_held


@pytest.mark.parametrize("mutant", [RecomputesTheLastBlock, ForgetsWhatIsShared])
def test_mutant_of_the_cache_is_killed(mutant: type[KvCache]) -> None:
    with pytest.raises(AssertionError):
        random_plays(50, mutant)


def test_mutant_that_knows_no_scratch_block_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scratch(seq: Any, positions: range, layout: Any) -> list[int]:
        num_shared, seq.num_shared_tokens = seq.num_shared_tokens, 0
        found: list[int] = slots(seq, positions, layout)
        seq.num_shared_tokens = num_shared
        return found

    slots = batch._slots
    monkeypatch.setattr(batch, "_slots", without_scratch)
    with pytest.raises(AssertionError, match="is written"):
        random_plays(50)
