"""Blocks of KV pools copied by the CPU kernels: the Python side of copies.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int64, c_void_p
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.native.kernels import Kernels, kernels

_Blocks = npt.NDArray[Any]


def native_copies() -> Callable[[_Blocks, _Blocks, Sequence[int], Sequence[int]], None] | None:
    """``copy_blocks`` with this process's kernels; None where it has none."""
    found = kernels()
    return None if found is None else partial(copy_blocks, found)


def copy_blocks(
    kernels: Kernels,
    target: _Blocks,
    source: _Blocks,
    target_blocks: Sequence[int],
    source_blocks: Sequence[int],
) -> None:
    """Rows ``source_blocks`` of ``source`` to rows ``target_blocks`` of ``target``, in their order.

    Both arrays are contiguous, with rows of as many bytes, and do not overlap. The interpreter's
    lock is let go of once, for all of them. Raises IndexError where an array has no such row.
    """
    assert target.flags.c_contiguous
    assert source.flags.c_contiguous
    assert len(target_blocks) == len(source_blocks)
    assert target[0].nbytes == source[0].nbytes
    to, of = (np.array(each, dtype=np.int64) for each in (target_blocks, source_blocks))
    for rows, array in ((to, target), (of, source)):
        if rows.size and not 0 <= rows.min() <= rows.max() < len(array):
            raise IndexError(f"blocks {rows.min()} to {rows.max()} of {len(array)}")
    _function(kernels)(
        *(target.ctypes.data, source.ctypes.data, to.ctypes.data, of.ctypes.data),
        *(len(to), target[0].nbytes),
    )


@lru_cache(maxsize=1)
def _function(kernels: Kernels) -> Any:
    places = (c_void_p, c_void_p, c_void_p, c_void_p)
    return kernels.function("copy_blocks", *places, c_int64, c_int64).unlocked
