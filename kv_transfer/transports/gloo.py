"""Two processes joined by torch.distributed's gloo.

Every (decode, prefill) pair gets a process group of its own, built directly on
a rendezvous over their stream: there is no default group, because membership
changes. Everything here blocks and belongs into a thread; torch drops the GIL.

A wait that times out makes gloo close the connection for good, and every other
wait on it then raises at once. So when each posted operation has either
finished or raised, nothing reads or writes its blocks any more.

gloo moves the host's memory: what lies on a GPU is copied there before, and back after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from baton.kv_layout import KvLayout
from kv_transfer.transports.base import LinkError
from kv_transfer.transports.rendezvous import Rendezvous

_dist: Any = torch.distributed  # its stubs lack most of what is used here


class TensorPool:
    """A KV pool as tensors of 64-bit words: gloo moves them faster than bytes."""

    def __init__(self, layout: KvLayout, memory: memoryview | torch.Tensor) -> None:
        self.layout = layout
        row_bytes = layout.head_dim * layout.item_bytes
        dtype = torch.int64 if row_bytes % 8 == 0 else torch.uint8
        if not isinstance(memory, torch.Tensor):
            memory = torch.frombuffer(memory, dtype=torch.uint8, count=layout.num_bytes)
        words = memory[: layout.num_bytes].view(dtype)
        rows = layout.num_kv_heads * layout.num_layers * layout.num_kv_parts
        self._rows = words.view(layout.num_blocks + 1, rows, layout.block_size, -1)

    def pieces(self, block_ids: Sequence[int], num_valid: Sequence[int]) -> list[torch.Tensor]:
        """A view of the valid tokens of each block; of a whole block it is contiguous."""
        return [
            self._rows[block, :, :num_tokens]
            for block, num_tokens in zip(block_ids, num_valid, strict=True)
        ]

    def zeros(self, num_valid: Sequence[int]) -> list[torch.Tensor]:
        """Zeros of the shapes that ``pieces`` has for these numbers of tokens."""
        return [torch.zeros_like(self._rows[0, :, :num_tokens]) for num_tokens in num_valid]


@dataclass(slots=True, eq=False)
class _Receive:
    work: Any
    arriving: torch.Tensor
    wanted: torch.Tensor


class _Store(_dist.Store):  # type: ignore[misc]
    """A rendezvous, as torch.distributed wants it."""

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s

    def set(self, key: str, value: bytes) -> None:
        self._rendezvous.set(key, bytes(value))

    def get(self, key: str) -> bytes:
        return self._rendezvous.wait([key], self._timeout_s)[0]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        self._rendezvous.wait(keys, timeout_s)


class Endpoint:
    """What all pairs of one process share: its pool, and gloo's listener and thread.

    Args:
        host: the only address on which gloo listens.
    """

    def __init__(self, layout: KvLayout, memory: memoryview | torch.Tensor, host: str) -> None:
        self.pool = TensorPool(layout, memory)
        self._device = _dist.ProcessGroupGloo.create_device(hostname=host, lazy_init=False)

    def pair(self, rendezvous: Rendezvous, *, rank: int, timeout_s: float) -> GlooPair:
        """Waits for the other rank. Raises LinkError where it does not turn up.

        Args:
            timeout_s: for the peer to turn up, and for each operation.
        """
        store = _Store(rendezvous, timeout_s)
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        options._devices = [self._device]
        try:
            process_group = _dist.ProcessGroupGloo(store, rank, 2, options)
        except (LinkError, RuntimeError, ValueError) as error:
            raise LinkError(f"the gloo pair did not form: {_first_line(error)}") from error
        return GlooPair(process_group, store, peer=1 - rank, timeout_s=timeout_s)


class GlooPair:
    """One two-rank group. After a LinkError it is of no more use."""

    def __init__(self, process_group: Any, store: _Store, *, peer: int, timeout_s: float) -> None:
        self._group = process_group
        self._store = store  # the group calls back into it and does not keep it alive
        self._peer = peer
        self._timeout_s = timeout_s

    def send(self, pieces: Sequence[torch.Tensor], tag: int) -> None:
        """Returns when the peer's receives have taken the pieces, in order. Raises LinkError."""
        works = []
        try:
            for piece in pieces:
                works.append(self._group.send([piece.cpu().contiguous()], self._peer, tag))
        except Exception as error:
            self._wait(works)
            raise LinkError(f"gloo cannot send: {_first_line(error)}") from error
        self._raise_first(self._wait(works))

    def receive(self, pieces: Sequence[torch.Tensor], tag: int, posted: Callable[[], None]) -> None:
        """Receives into the pieces, in order; ``posted`` is called when the peer may send.

        Returns or raises (LinkError) only when nothing writes the pieces any more.
        """
        receives: list[_Receive] = []
        try:
            for piece in pieces:
                # A part of a block is no single run: it arrives beside the pool.
                here = piece.is_contiguous() and not piece.is_cuda
                arriving = piece if here else torch.empty(piece.shape, dtype=piece.dtype)
                work = self._group.recv([arriving], self._peer, tag)
                receives.append(_Receive(work, arriving, piece))
        except Exception as error:
            self._wait([receive.work for receive in receives])
            raise LinkError(f"gloo cannot receive: {_first_line(error)}") from error
        posted()
        self._raise_first(self._wait([receive.work for receive in receives]))
        for receive in receives:
            if receive.arriving is not receive.wanted:
                receive.wanted.copy_(receive.arriving)

    def _wait(self, works: Sequence[Any]) -> list[RuntimeError]:
        """Waits until every one has finished or raised, all within one timeout."""
        until = time.monotonic() + self._timeout_s
        errors = []
        for work in works:
            try:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
            except RuntimeError as error:
                errors.append(error)
        return errors

    @staticmethod
    def _raise_first(errors: list[RuntimeError]) -> None:
        if errors:
            raise LinkError(f"gloo failed: {_first_line(errors[0])}") from errors[0]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
