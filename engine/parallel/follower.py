"""A rank that follows: it computes the steps that its leader tells, and decides nothing."""

from __future__ import annotations

import mmap
import os
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import torch

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.errors import CheckpointError
from baton.heap import release_free_memory
from baton.kv_layout import KvLayout
from engine.attention.paged_cpu import attention_of
from engine.batch import Batch
from engine.gpu.plan import GpuPlan
from engine.models.decoder import Decoder
from engine.native.kernels import use_kernels
from engine.parallel.followers import READY, RankTask
from engine.parallel.group import RankGroups, store_at
from engine.parallel.step_message import END, decode_step
from engine.weights.load import load_weights


def follow(connection: Connection) -> None:
    """Serves one leader to its end. Raises EOFError when the leader has died,
    CheckpointError for weights that cannot be loaded, RuntimeError when another rank died."""
    task = RankTask.from_json(connection.recv_bytes())
    rank: _Rank | _GpuRank
    if task.gpu is None:
        rank = _Rank(task, _received_memory(connection, task.layout))
    else:
        rank = _GpuRank(task, task.gpu.plan(task.rank))
    connection.send_bytes(READY)
    while (message := connection.recv_bytes()) != END:
        rank.compute(decode_step(message))


def _received_memory(connection: Connection, layout: KvLayout) -> mmap.mmap:
    """The worker's KV memory, which all its ranks write to, each its own heads."""
    descriptor = recv_handle(connection)
    try:
        return mmap.mmap(descriptor, layout.num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)


class _Rank:
    def __init__(self, task: RankTask, memory: mmap.mmap) -> None:
        torch.set_num_threads(task.threads)
        use_kernels(task.cpu_kernels)
        groups = RankGroups.join(store_at(task.store_port), task.shard)
        checkpoint, dtype = _checkpoint_of(task), task.torch_dtype
        kv = torch.frombuffer(memory, dtype=dtype).view(task.layout.shape)
        with torch.inference_mode():
            weights = load_weights(checkpoint, dtype)
            self._model = Decoder(checkpoint.config, weights, groups, task.quantization)
            self._attention = attention_of(checkpoint.config, task.layout, kv, groups)
        release_free_memory()

    @torch.inference_mode()
    def compute(self, batch: Batch) -> None:
        attention = self._attention.begin(batch)
        self._model.forward(batch.token_ids, batch.positions, batch.sampled_rows, attention)


class _GpuRank:
    """One that has a GPU, and in its memory a pool of its own KV heads."""

    def __init__(self, task: RankTask, plan: GpuPlan) -> None:
        torch.set_num_threads(task.threads)
        use_kernels("torch")
        if plan.device.type == "cuda":
            torch.cuda.set_device(plan.device)
        groups = RankGroups.join(store_at(task.store_port), task.shard, plan.device)
        checkpoint, dtype = _checkpoint_of(task), task.torch_dtype
        layout = groups.shard.own_layout(checkpoint.config, task.layout)
        with torch.inference_mode():
            pool = plan.memory(layout).view(dtype).view(layout.shape)
            weights = plan.weights(load_weights(checkpoint, dtype, plan.device))
            model = Decoder(checkpoint.config, weights, groups)
            self._steps = plan.steps(model, checkpoint.config, layout, pool, groups=groups)
        release_free_memory()

    @torch.inference_mode()
    def compute(self, batch: Batch) -> None:
        self._steps.compute(batch, batch.sampled_rows)


def _checkpoint_of(task: RankTask) -> Checkpoint:
    checkpoint = open_checkpoint(task.model, task.load_format)
    if checkpoint.revision != task.revision:
        raise CheckpointError(f"{task.model} has changed since this worker began to start")
    return checkpoint
