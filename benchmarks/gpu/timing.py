"""How long a GPU takes, and what it does at best: copies, and products of large matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# Its stubs have no types for events.
_cuda: Any = torch.cuda

_COPIED_BYTES = 2 << 30
"""Beyond every cache."""
_SIDE = 8192
"""Of the matrices whose product is timed."""
_REPEATS = 20
_WARM_UPS = 3


def device_ms(work: Callable[[], object], *, repeats: int = _REPEATS) -> float:
    """The median that the GPU takes for ``work``, between two of its events."""
    for _ in range(_WARM_UPS):
        work()
    times: list[float] = []
    for _ in range(repeats):
        began, ended = (_cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


def host_ms(work: Callable[[], object], *, repeats: int, warm_ups: int = _WARM_UPS) -> float:
    """The median that ``work`` takes on the host, which waits for the GPU in it."""
    for _ in range(warm_ups):
        work()
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def copied_bytes_per_s() -> float:
    """Read and written, from one part of the GPU's memory to another."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / (device_ms(lambda: target.copy_(source)) / 1000)


def multiplied_per_s() -> float:
    """Multiplications and additions of bfloat16 matrices, by torch's own product."""
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _SIDE**3 / (device_ms(lambda: torch.mm(a, b, out=out)) / 1000)
