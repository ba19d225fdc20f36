"""Which runs of memory a range of blocks is read into and out of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv_layout import KvLayout
from kv_transfer.blocks import PoolView
from kv_transfer.ranges import BlockRange
from kv_transfer.runs import Area, runs

LAYOUT = KvLayout(
    num_blocks=9, num_kv_heads=2, num_layers=3, block_size=4, head_dim=2, dtype="bfloat16"
)
INTO, OUT_OF = Area(LAYOUT, 10_000), Area(LAYOUT, 500_000)


def read(blocks: BlockRange) -> tuple[np.ndarray, np.ndarray]:
    """The destination after the runs, and after the copy of the other transports."""
    source = np.random.default_rng(1).integers(0, 256, LAYOUT.num_bytes, dtype=np.uint8)
    by_runs, by_blocks = np.zeros_like(source), np.zeros_like(source)
    for into, out_of in zip(*runs(blocks, INTO, OUT_OF), strict=True):
        start, begin, size = int(into[0]) - 10_000, int(out_of[0]) - 500_000, int(into[1])
        assert size == out_of[1]
        assert into[2] == out_of[2] == 0
        by_runs[start : start + size] = source[begin : begin + size]
    pool = PoolView(LAYOUT, memoryview(by_blocks))
    for at, (block, source_block) in enumerate(
        zip(blocks.blocks, blocks.source_blocks, strict=True)
    ):
        num_tokens = min(4, blocks.num_tokens - 4 * at)
        pool.copy_from(PoolView(LAYOUT, memoryview(source)), source_block, block, num_tokens)
    return by_runs, by_blocks


@given(
    st.integers(1, 36),
    st.permutations(range(9)),
    st.one_of(st.permutations(range(9)), st.just(list(range(9)))),
)
def test_runs_move_what_a_copy_block_by_block_moves(
    num_tokens: int, sources: list[int], blocks: list[int]
) -> None:
    needed = LAYOUT.num_blocks_for(num_tokens)
    by_runs, by_blocks = read(
        BlockRange(0, num_tokens, tuple(sources[:needed]), tuple(blocks[:needed]))
    )
    np.testing.assert_array_equal(by_runs, by_blocks)


def test_blocks_that_follow_each_other_on_both_sides_are_one_run() -> None:
    into, out_of = runs(BlockRange(0, 24, (3, 4, 5, 7, 8, 1), (0, 1, 2, 3, 4, 5)), INTO, OUT_OF)
    size = LAYOUT.block_bytes
    assert (into[:, 0] - 10_000).tolist() == [0, 3 * size, 5 * size]
    assert (out_of[:, 0] - 500_000).tolist() == [3 * size, 7 * size, size]
    assert into[:, 1].tolist() == [3 * size, 2 * size, size]


def test_block_in_part_is_one_run_for_each_head_layer_and_part() -> None:
    into, _ = runs(BlockRange(0, 6, (3, 4), (0, 1)), INTO, OUT_OF)
    assert into[:, 1].tolist() == [LAYOUT.block_bytes] + [2 * 4] * (2 * 3 * 2)


@pytest.mark.parametrize(("source", "block"), [(9, 0), (0, 9), (-1, 0)])
def test_blocks_that_a_pool_lacks_are_an_error(source: int, block: int) -> None:
    with pytest.raises(IndexError, match="no such block"):
        runs(BlockRange(0, 4, (source,), (block,)), INTO, OUT_OF)
