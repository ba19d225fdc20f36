"""How a worker's parts are made."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest
import torch

from engine.worker_parts import _in_own_thread


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch makes other threads, which nobody computes on, as soon as it is told the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _compute() -> int:
    torch.ones(4_000_000).add_(1)
    return num_threads()


@pytest.mark.usefixtures("three_threads")
async def test_threads_that_loaded_weights_are_gone_when_decoding_begins() -> None:
    """Those of OpenMP too: with more of them than cores, none waits awake for the next operator."""
    before = num_threads()
    assert await _in_own_thread(_compute) >= before + 3, "it does not compute on several threads"
    ends_at = time.monotonic() + 10
    while num_threads() > before:
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.01)
