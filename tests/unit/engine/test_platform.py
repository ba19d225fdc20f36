"""What the C library keeps goes back to the kernel."""

from __future__ import annotations

import psutil
import torch

from engine.platform import release_free_memory

_MB = 1 << 20


def resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / _MB


def test_memory_of_freed_tensors_goes_back_to_the_kernel() -> None:
    """One that lives on above them keeps the heap from shrinking by itself."""
    tensors = [torch.zeros(100 * 1024, dtype=torch.uint8) for _ in range(2000)]
    above = tensors.pop()
    held = resident_mb()
    tensors.clear()
    assert held - resident_mb() < 50, "it went back by itself"
    release_free_memory()
    assert held - resident_mb() > 150
    assert len(above) == 100 * 1024
