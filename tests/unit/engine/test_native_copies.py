"""The kernel copies the blocks that were named, and refuses those that are not there."""

from __future__ import annotations

import numpy as np
import pytest
from support.cpu_kernels import computing_with

from engine.native.copies import copy_blocks, native_copies
from engine.native.kernels import kernels


def test_named_rows_are_copied_and_no_other() -> None:
    random = np.random.default_rng(0)
    source = random.integers(0, 1 << 60, (40, 999))
    target = random.integers(0, 1 << 60, (30, 999))
    to, of = random.permutation(30)[:17].tolist(), random.permutation(40)[:17].tolist()
    expected = target.copy()
    expected[to] = source[of]
    with computing_with("native"):
        native = kernels()
        assert native is not None
        copy_blocks(native, target, source, to, of)
        copy_blocks(native, target, source, [], [])
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize(
    ("to", "of"), [([0, 3], [0, 0]), ([0, 0], [0, 5]), ([-1], [0]), ([0], [-1])]
)
def test_block_that_an_array_has_not_is_an_error(to: list[int], of: list[int]) -> None:
    target, source = np.zeros((3, 8), np.uint8), np.ones((5, 8), np.uint8)
    with computing_with("native"):
        native = kernels()
        assert native is not None
        with pytest.raises(IndexError):
            copy_blocks(native, target, source, to, of)
    assert not target.any()


def test_without_kernels_there_is_none() -> None:
    with computing_with("torch"):
        assert native_copies() is None
