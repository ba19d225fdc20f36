"""Collectives among the ranks of one worker, over torch.distributed's process groups.

The groups are objects of their own: torch's global default group is not used, so that
one process may be in several, one after the other. Each operation returns when its
result is there; on a GPU, work that is launched afterwards finds it there. CPUs use gloo, GPUs
NCCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from socket import create_server
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.gpu.device import CPU
from engine.parallel.shard import Shard

# Parts of torch.distributed that its type stubs do not know.
_dist: Any = dist

_TIMEOUT = timedelta(minutes=30)
"""Nothing waits this long: a rank's death is noticed by the kernel, a hang by ``engine.hang_s``."""

_LOOPBACK = "127.0.0.1"


class ParallelGroup:
    """``size`` ranks, this one being ``rank``. Of a single one, no operation does anything."""

    def __init__(self, rank: int = 0, size: int = 1, process_group: Any = None) -> None:
        assert (process_group is None) == (size == 1)
        self.rank = rank
        self.size = size
        self._process_group = process_group

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; bit for bit the same on each."""
        if self.size > 1:
            self._process_group.allreduce([tensor]).wait()
        return tensor

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """``sent[i]`` consecutive rows go to rank i; ``received[i]`` come from it, in order."""
        if self.size == 1:
            return rows
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        options = _dist.AllToAllOptions()
        self._process_group.alltoall_base(
            out, rows.contiguous(), list(received), list(sent), options
        ).wait()
        return out

    def gather(self, tensor: Tensor) -> list[Tensor] | None:
        """On rank 0 every rank's tensor, all of one shape; None on the others."""
        if self.size == 1:
            return [tensor]
        options = _dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        outputs = [] if parts is None else [parts]
        self._process_group.gather(outputs, [tensor.contiguous()], options).wait()
        return parts


def found_store() -> Any:
    """Where the ranks find each other: on a port of the loopback interface alone."""
    listener = create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    return _dist.TCPStore(
        _LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def store_at(port: int) -> Any:
    """What ``found_store`` made in another process."""
    return _dist.TCPStore(_LOOPBACK, port, wait_for_workers=False)


@dataclass(frozen=True, slots=True)
class RankGroups:
    """A rank's place in its worker, and whom it computes with.

    ``world`` has all ranks; ``experts`` those of the other expert groups that hold the
    same part of each matrix, one of each group.
    """

    shard: Shard = field(default_factory=Shard)
    world: ParallelGroup = field(default_factory=ParallelGroup)
    experts: ParallelGroup = field(default_factory=ParallelGroup)

    @classmethod
    def join(cls, store: Any, shard: Shard, device: torch.device = CPU) -> RankGroups:
        """For tensors on ``device``, which on a GPU is this thread's current one.

        Returns once every rank has come to ``store``; on GPUs they meet in their first operation.
        Raises RuntimeError when one does not come.
        """
        backend = _nccl if device.type == "cuda" else _gloo

        def group(name: str, rank: int, size: int) -> ParallelGroup:
            if size == 1:
                return ParallelGroup()
            return ParallelGroup(rank, size, backend(_dist.PrefixStore(name, store), rank, size))

        return cls(
            shard,
            world=group("world", shard.rank, shard.num_ranks),
            experts=group(
                f"experts {shard.tensor_rank}", shard.expert_group, shard.parallel.expert
            ),
        )


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = _TIMEOUT
    options._threads = 1
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
    return _dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return _dist.ProcessGroupNCCL(store, rank, size, options)
