"""What the hand-off's benchmark moves, and in which orders pools could be laid out."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest

from baton.kv_layout import KvLayout
from benchmarks.handoff.cases import FreeList, Load, load_in
from benchmarks.handoff.orders import ORDERS, byte_strides, canonical, num_resharded, num_runs
from benchmarks.handoff.shapes import SHAPES

TINY = KvLayout(
    num_blocks=4, num_kv_heads=4, num_layers=3, block_size=2, head_dim=8, dtype="bfloat16"
)


def test_no_more_requests_go_at_once_than_the_pool_has_room_for() -> None:
    layout = SHAPES["8b"].layout_within(2 << 30)
    assert layout.num_blocks == 1024
    assert load_in(layout, 4096, 16) == Load(4096, 16, 4)
    assert list(Load(4096, 16, 6).waves()) == [6, 6, 4]
    assert load_in(layout, 1024, 1).at_once == 1
    with pytest.raises(ValueError, match="20000 tokens need 1250 blocks, the pool has 1024"):
        load_in(layout, 20000, 1)


def test_requests_of_a_wave_share_no_block_and_the_next_wave_gets_others() -> None:
    layout = SHAPES["smollm2"].layout(64)
    free, load = FreeList(layout, 1), Load(tokens=128, requests=4, at_once=4)
    first, second = (list(chain(*free.take(load, 4))) for _ in range(2))
    assert len(first) == 32
    assert sorted(first + second) == list(range(64))
    assert sum(b - a == 1 for a, b in pairwise(first)) < 4


def test_todays_order_is_the_layouts_own() -> None:
    assert tuple(byte_strides("BHLPTD", TINY).values())[::-1] == TINY.strides
    assert "today" in ORDERS["BHLPTD"]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_holds_the_same_elements(order: str) -> None:
    view = canonical(order, TINY, np.arange(np.prod(TINY.shape)))
    assert view.shape == TINY.shape
    assert len(np.unique(view)) == view.size
    strides = byte_strides(order, TINY)
    place = sum(at * strides[axis] for at, axis in zip((2, 1, 1, 0, 1, 3), "BHLPTD", strict=True))
    assert view[2, 1, 1, 0, 1, 3] == place // TINY.item_bytes


@pytest.mark.parametrize(
    ("order", "whole", "two_heads"),
    [("BHLPTD", 1, 1), ("BLPHTD", 1, 6), ("BLPTHD", 1, 12), ("LPBHTD", 6, 6), ("LPBTHD", 6, 12)],
)
def test_runs_are_those_that_both_sides_have(order: str, whole: int, two_heads: int) -> None:
    half = KvLayout(
        num_blocks=4, num_kv_heads=2, num_layers=3, block_size=2, head_dim=8, dtype="bfloat16"
    )
    assert num_runs(order, TINY, TINY, 4) == whole
    assert num_runs(order, TINY, half, 2) == num_runs(order, half, TINY, 2) == two_heads
    assert num_resharded(order, TINY, 1, 2) == 2 * two_heads
