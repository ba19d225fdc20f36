"""CUDA graphs of decode steps: one for each padded number of sequences, replayed as one launch.

A graph has the addresses and sizes of everything that was launched while it was recorded, so it
computes on the arrays of ``DecodeInputs``, for as many rows as it was recorded with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Its stubs have no types for streams.
_cuda: Any = torch.cuda

logger = logging.getLogger(__name__)

_WARM_UPS = 2
"""Kernels are compiled, and libraries choose theirs, outside of what is recorded."""


def padded_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, … below ``most``, and ``most``."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*sizes, most]


class DecodeGraphs:
    """``forward`` computes the logits, float32 [rows, vocabulary], of the first so many rows."""

    def __init__(self, forward: Callable[[int], Tensor], *, most: int) -> None:
        self._forward = forward
        self._sizes = padded_sizes(most)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def record(self) -> None:
        """Records a graph of each size, the largest first: the others' intermediate results
        then find room in its memory, which they share."""
        began = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._warm_up(size)
            graph = torch.cuda.CUDAGraph()
            # Of this thread's calls alone: NCCL's own thread asks after events meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self._forward(size)
            self._recorded[size] = graph, logits
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        logger.info("recorded %d graphs of decode steps in %.1f s", len(self._sizes), took)

    def run(self, num_rows: int) -> Tensor:
        """Logits of the first ``num_rows`` rows, at most the most; the next run overwrites them.

        What was not recorded is computed as it is, at the same padded size.
        """
        size = next(size for size in self._sizes if size >= num_rows)
        recorded = self._recorded.get(size)
        if recorded is None:
            return self._forward(size)[:num_rows]
        graph, logits = recorded
        graph.replay()
        return logits[:num_rows]

    def _warm_up(self, size: int) -> None:
        """On a stream of its own, as recording wants it."""
        stream: Any = _cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(size)
        torch.cuda.current_stream().wait_stream(stream)
