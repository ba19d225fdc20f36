"""The bounds: what copies the same blocks with nothing around it.

- *memcpy*: libc's, block by block over the same scatter list, by one thread of one process.
- *gather + gloo + scatter*: the sender gathers blocks into a buffer, sends it through a bare
  two-rank gloo group, and the receiver scatters it, piece by piece, each with one thread.
- *contiguous gloo*: as many bytes from one run of memory into another, through the same group.
- *NIXL alone*: ``bare_nixl.py``.

A piece is 4 MiB: of whole blocks, at least one. Larger ones leave the caches between gathering
and sending: 16 MiB goes at half the rate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from baton.kv_layout import KvLayout

_dist: Any = torch.distributed  # its stubs lack most of what is used here
PIECE_BYTES = 4 << 20
_TIMEOUT = timedelta(seconds=60)


class Memcpy:
    """Copies blocks of one mapped pool into another.

    ``source`` and ``target`` are addresses of pools that are laid out as ``layout``.
    """

    def __init__(self, layout: KvLayout, source: int, target: int) -> None:
        self._size = layout.block_bytes
        self._source = source
        self._target = target
        self._copy = ctypes.CDLL(None).memcpy
        self._copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def run(self, source_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        copy, size, source, target = self._copy, self._size, self._source, self._target
        for source_block, block in zip(source_blocks, blocks, strict=True):
            copy(target + block * size, source + source_block * size, size)


class GlooPair:
    """One rank of a bare two-rank group, computing with one thread.

    Args:
        store: a file of its own, by which the two find each other.
        rank: 0 sends, 1 receives.
    """

    def __init__(self, store: str, rank: int) -> None:
        torch.set_num_threads(1)
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = _TIMEOUT
        options._threads = 1
        options._devices = [
            _dist.ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)
        ]
        self._store = _dist.FileStore(store, 2)
        self._group = _dist.ProcessGroupGloo(self._store, rank, 2, options)

    def send(self, runs: Sequence[torch.Tensor]) -> None:
        """Returns when all are sent; they were posted together."""
        self._wait([self._group.send([run], 1, 0) for run in runs])

    def receive(self, runs: Sequence[torch.Tensor]) -> None:
        self._wait([self._group.recv([run], 0, 0) for run in runs])

    @staticmethod
    def _wait(works: Sequence[Any]) -> None:
        for work in works:
            work.wait()


class BareGloo:
    """One rank of such a group, and the pool that its pieces come from or go to."""

    def __init__(self, layout: KvLayout, memory: memoryview, *, store: str, rank: int) -> None:
        self._pair = GlooPair(store, rank)
        words = layout.num_bytes // 8
        self._pool = torch.frombuffer(memory, dtype=torch.int64, count=words).view(
            layout.num_blocks + 1, -1
        )
        self._per_piece = max(1, PIECE_BYTES // layout.block_bytes)
        self._staging = torch.ones_like(self._pool[: self._per_piece]).contiguous()

    def send_scattered(self, blocks: Sequence[int]) -> None:
        def send(ids: torch.Tensor, buffer: torch.Tensor) -> None:
            torch.index_select(self._pool, 0, ids, out=buffer)
            self._pair.send([buffer])

        self._pieces(blocks, send)

    def receive_scattered(self, blocks: Sequence[int]) -> None:
        def receive(ids: torch.Tensor, buffer: torch.Tensor) -> None:
            self._pair.receive([buffer])
            for block, row in zip(ids.tolist(), buffer, strict=True):
                self._pool[block].copy_(row)

        self._pieces(blocks, receive)

    def send_contiguous(self, num_blocks: int) -> None:
        self._pair.send(self._runs(num_blocks))

    def receive_contiguous(self, num_blocks: int) -> None:
        self._pair.receive(self._runs(num_blocks))

    def _runs(self, num_blocks: int) -> tuple[torch.Tensor, ...]:
        return torch.split(self._pool[:num_blocks], self._per_piece)

    def _pieces(
        self, blocks: Sequence[int], move: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        for ids in torch.split(torch.tensor(blocks), self._per_piece):
            move(ids, self._staging[: len(ids)])
