"""Memory for weights in pages of 2 MiB."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from engine.native.huge_pages import _SEGMENT_BYTES, HugePages


def flags_at(address: int) -> set[str]:
    """Of the mapping with this address, as the kernel names them."""
    found: tuple[int, int] = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(header[1], 16), int(header[2], 16)
        elif line.startswith("VmFlags:") and found[0] <= address < found[1]:
            return set(line.split()[1:])
    return set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_apart_aligned_and_as_asked(dtype: torch.dtype) -> None:
    pages = HugePages()
    tensors = [pages.empty(number, 3, dtype=dtype) for number in range(1, 40)]
    for number, tensor in enumerate(tensors, 1):
        assert tensor.shape == (number, 3)
        assert tensor.dtype == dtype
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors, 1))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without them"
)
def test_kernel_is_asked_for_huge_pages() -> None:
    tensor = HugePages().empty(1 << 20, dtype=torch.int64)
    assert "hg" in flags_at(tensor.data_ptr())


def test_one_larger_than_a_segment_has_its_own() -> None:
    pages = HugePages()
    small = pages.empty(10, dtype=torch.uint8)
    large = pages.empty(_SEGMENT_BYTES + 1, dtype=torch.uint8)
    large[-1] = 7
    small.fill_(1)
    assert large[-1] == 7
    assert large[0] == 0


def test_memory_goes_with_the_last_tensor() -> None:
    pages = HugePages()
    first, second = (pages.empty(_SEGMENT_BYTES // 2, dtype=torch.uint8) for _ in range(2))
    address = first.data_ptr()
    third = pages.empty(8, dtype=torch.uint8)  # in a segment of its own
    del first
    gc.collect()
    assert flags_at(address)
    second.fill_(3)
    del second
    gc.collect()
    assert not flags_at(address)
    assert third.sum() == 0
