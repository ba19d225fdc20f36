"""Invariant 4 of the hand-off: READY only when every expected rank has done its part.

A worker's ranks share one KV memory and are one sender (docs/adr/0011-ranks-of-a-worker.md), so
a receiver counts no ranks; what it counts on is that a block is announced only when every rank
has written its heads of every layer. Ranks move in any order here, the leader ahead or behind,
and one of them may be stopped, or die, anywhere: what was announced is whole, and a step that
some rank has not finished announces nothing.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stepping_ranks import NUM_TOKENS, RankWorld, kv_of, single_kv
from torch import Tensor

from engine.parallel.group import ParallelGroup
from engine.sequence import Sampled, Scheduled
from prefill_workers.worker import PrefillWorker

MOST_MOVES = 400


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def expected() -> Tensor:
    return single_kv()


def check_announced(world: RankWorld, end_token: int, block_ids: list[int]) -> None:
    found = kv_of(world.kv, end_token, block_ids)
    written = (found != 0).any(dim=-1)  # zeroed when the blocks were taken
    assert written.all(), "announced before every rank had written its heads"
    assert torch.allclose(found, expected()[:, :, :, :end_token], atol=1e-4)


def play(
    size: int,
    choices: Sequence[int],
    *,
    fault_at: int | None,
    victim: int,
    dies: bool,
    **mutants: Any,
) -> str:
    """The outcome of one schedule: which rank moves next, and who is lost at which move."""
    world = RankWorld(size, **mutants)
    world.on_ready = functools.partial(check_announced, world)
    lost = None
    try:
        for number in range(MOST_MOVES):
            if number == fault_at:
                lost = world.ranks[victim % size]
                lost.stopped = True
                if dies:
                    lost.end()
            runnable = world.runnable()
            if not runnable:
                break
            choice = choices[number % len(choices)] if choices else 0
            # The first, the last, or one between: so leaders and laggards are frequent.
            runnable[choice % len(runnable)].move()
        else:
            raise AssertionError("the ranks never come to rest")
        done = world.committed
        assert done or lost is not None, "the ranks wait for each other for ever"
        if done:
            assert world.announced[-1][0] == NUM_TOKENS
        return "whole" if done else ("died" if dies else "stopped")
    finally:
        world.end()


@settings(max_examples=100, deadline=None)
@given(
    size=st.sampled_from([2, 4]),
    choices=st.lists(st.integers(0, 11), min_size=1, max_size=60),
    fault_at=st.none() | st.integers(0, 150),
    victim=st.integers(0, 3),
    dies=st.booleans(),
)
def test_blocks_are_announced_only_when_every_rank_has_written_its_heads(
    size: int, choices: list[int], fault_at: int | None, victim: int, dies: bool
) -> None:
    play(size, choices, fault_at=fault_at, victim=victim, dies=dies)


def random_plays(num: int, sizes: Sequence[int] = (2, 4), **mutants: Any) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(num):
        dice = random.Random(seed)
        favourite = dice.randrange(4)
        choices = [favourite if dice.random() < 0.6 else dice.randrange(12) for _ in range(60)]
        fault_at = dice.randrange(120) if dice.random() < 0.6 else None
        fate = {"fault_at": fault_at, "victim": dice.randrange(4), "dies": dice.random() < 0.5}
        seen[play(sizes[seed % len(sizes)], choices, **fate, **mutants)] += 1
    return seen


def test_random_orders_end_well_and_with_ranks_lost_in_the_middle() -> None:
    seen = random_plays(100)
    assert min(seen[what] for what in ("whole", "died", "stopped")) >= 5, seen


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_thousands_of_orders() -> None:
    random_plays(4000)


# ------------------------------------------------------------------------------ mutants


class LeaderCountsItself(ParallelGroup):
    """The first rank goes on with its own part of every sum."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if self.rank == 0:
            self._process_group.allreduce([tensor])
            return tensor
        return super().all_reduce_(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        return [tensor] * self.size if self.rank == 0 else super().gather(tensor)


class WaitsForOneRank(ParallelGroup):
    """Counts answers, not ranks: any other's will do for all."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        group = self._process_group
        number = group._all.bring(self.rank, tensor)
        brought = group._all._brought[number]
        group._all._world.ranks[self.rank].give_way(lambda: len(brought) > 1)
        return tensor.copy_(sum(brought.values()))


class AnnouncesWhatItSchedules(PrefillWorker):
    def step(self) -> bool:
        compute = self._engine.step

        def announced_first(chunks: Sequence[Scheduled]) -> list[Sampled]:
            for chunk in chunks:
                job = self._jobs[chunk.seq.key]  # type: ignore[index]
                self._ready(job, chunk.seq.num_computed_tokens + chunk.num_tokens)
            return compute(chunks)

        self._engine.step = announced_first  # type: ignore[method-assign]
        try:
            return super().step()
        finally:
            self._engine.step = compute  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("sizes", "mutant"),
    [
        ((2, 4), {"group": LeaderCountsItself}),
        ((4,), {"group": WaitsForOneRank}),
        ((2, 4), {"worker": AnnouncesWhatItSchedules}),
        ((2,), {"defers": True}),
    ],
    ids=["LeaderCountsItself", "WaitsForOneRank", "AnnouncesWhatItSchedules", "WritesLate"],
)
def test_each_mutant_is_killed(sizes: tuple[int, ...], mutant: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="before every rank had written"):
        random_plays(40, sizes, **mutant)
