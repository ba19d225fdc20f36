"""The ranks of a worker other than its first, as the first one sees them.

1. ``lead`` tells each over its connection what to load, and joins their groups. With it
   goes the KV memory, which they map: every rank writes its own heads of each block. On GPUs each
   has a pool of its own heads instead.
2. ``wait_ready`` returns once all have their weights.
3. ``send`` starts a step; all compute it together, and only the leader gets its logits.
4. ``close`` tells them that there are no more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import torch
from torch import Tensor

from baton.checkpoint.checkpoint import LoadFormat
from baton.errors import InternalError
from baton.kv_layout import KvLayout
from baton.parallelism import Parallelism
from engine.batch import Batch
from engine.gpu.device import CPU, GpuAttention
from engine.gpu.plan import GpuPlan
from engine.native.kernels import Choice
from engine.parallel.group import RankGroups, found_store
from engine.parallel.shard import Shard
from engine.parallel.step_message import END, encode_step
from engine.quantized import Quantization

READY = b"ready"


@dataclass(frozen=True, slots=True)
class GpuTask:
    """How all ranks compute on GPUs: ``GpuPlan``, with the kind of device alone."""

    device_type: str
    attention: GpuAttention
    max_num_seqs: int
    max_model_len: int

    @classmethod
    def of(cls, plan: GpuPlan) -> GpuTask:
        return cls(plan.device.type, plan.attention, plan.max_num_seqs, plan.max_model_len)

    def plan(self, rank: int) -> GpuPlan:
        """On the GPU of the rank's number."""
        name = f"cuda:{rank}" if self.device_type == "cuda" else self.device_type
        return GpuPlan(torch.device(name), self.attention, self.max_num_seqs, self.max_model_len)


@dataclass(frozen=True, slots=True)
class RankTask:
    """What a follower is told at first. ``revision`` is that of the leader's checkpoint,
    the store is where the ranks find each other."""

    model: str
    load_format: LoadFormat
    revision: str
    dtype: str
    layout: KvLayout
    threads: int
    parallel: Parallelism
    cpu_kernels: Choice = "torch"
    quantization: Quantization = "none"
    gpu: GpuTask | None = None
    """None: CPUs compute."""
    rank: int = 0
    store_port: int = 0

    @property
    def shard(self) -> Shard:
        return Shard(self.parallel, self.rank)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_json(self, *, rank: int, store_port: int) -> bytes:
        return json.dumps(asdict(self) | {"rank": rank, "store_port": store_port}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> RankTask:
        fields = json.loads(data)
        layout, parallel = KvLayout(**fields.pop("layout")), Parallelism(**fields.pop("parallel"))
        gpu = fields.pop("gpu")
        return cls(
            **fields, layout=layout, parallel=parallel, gpu=None if gpu is None else GpuTask(**gpu)
        )


class Followers:
    """Not thread-safe but for ``close``, which may come while a step is under way."""

    def __init__(self, connections: SequenceOf[Connection], groups: RankGroups) -> None:
        self._connections = connections
        self.groups = groups

    @classmethod
    def lead(
        cls, connections: SequenceOf[Connection], task: RankTask, memory_fd: int | None
    ) -> Followers:
        """Returns once all have joined and mapped ``memory_fd``, which stays the caller's; on
        GPUs it is left alone, since each rank has a pool of its own.

        ``connections`` are Unix sockets to rank 1, 2 and so on.
        """
        store = found_store()
        for rank, connection in enumerate(connections, start=1):
            connection.send_bytes(task.to_json(rank=rank, store_port=store.port))
            if task.gpu is None:
                assert memory_fd is not None, "ranks of a CPU share one memory"
                send_handle(connection, memory_fd, 0)
        device = CPU if task.gpu is None else torch.device(task.gpu.device_type)
        return cls(connections, RankGroups.join(store, Shard(task.parallel), device))

    def wait_ready(self) -> None:
        """Raises InternalError for a follower that has ended."""
        for rank, connection in enumerate(self._connections, start=1):
            try:
                answer = connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise InternalError(f"rank {rank} ended before it was ready") from error
            assert answer == READY

    def send(self, batch: Batch, sampled_rows: Tensor) -> None:
        message = encode_step(batch, sampled_rows)
        for connection in self._connections:
            connection.send_bytes(message)

    def close(self) -> None:
        for connection in self._connections:
            with suppress(OSError):  # it has ended already
                connection.send_bytes(END)
