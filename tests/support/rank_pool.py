"""Ranks in processes of their own that serve one tiny engine after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.tiny_engine import DOMAIN, kv_layout
from support.triton_cases import interpreted_or_skip

from baton.checkpoint.checkpoint import open_checkpoint
from baton.parallelism import Parallelism
from engine.engine import Engine
from engine.gpu.plan import GpuPlan
from engine.parallel.follower import follow
from engine.parallel.followers import Followers, GpuTask, RankTask
from engine.parallel.shard import Shard
from engine.quantized import Quantization
from kv_transfer.memory import KvMemory


def _serve(connection: Connection, *, interpreted: bool) -> None:
    if interpreted:
        interpreted_or_skip("engine.attention.triton_paged")
    with contextlib.suppress(EOFError):
        while True:
            follow(connection)


@contextlib.contextmanager
def leads(
    connections: Sequence[Connection],
    model: str,
    parallel: Parallelism,
    *,
    dtype: str = "float32",
    quantization: Quantization = "none",
    gpu: GpuPlan | None = None,
) -> Iterator[Engine]:
    """The engine of rank 0, with as many of the followers as ``parallel`` takes."""
    checkpoint = open_checkpoint(model)
    layout = replace(kv_layout(checkpoint.config, 20, 16), dtype=dtype)
    own_layout = Shard(parallel).own_layout(checkpoint.config, layout) if gpu else layout
    memory = KvMemory(layout.num_bytes, sealed=False)
    task = RankTask(
        model=model,
        load_format="auto",
        revision=checkpoint.revision,
        dtype=dtype,
        layout=layout,
        threads=1,
        parallel=parallel,
        quantization=quantization,
        gpu=GpuTask.of(gpu) if gpu else None,
    )
    followers = None
    if parallel.num_ranks > 1:
        followers = Followers.lead(connections[: parallel.num_ranks - 1], task, memory.fd)
    try:
        yield Engine(
            checkpoint,
            dtype=getattr(torch, dtype),
            layout=own_layout,
            memory=gpu.memory(own_layout) if gpu else memory.buffer,
            domain=DOMAIN,
            followers=followers,
            quantization=quantization,
            gpu=gpu,
        )
    finally:
        if followers is not None:
            followers.close()
        memory.close()


@contextlib.contextmanager
def one_thread_and_own_cache(folder: Path) -> Iterator[None]:
    """For tests that begin ranks' processes meanwhile, which have the cache too."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_CACHE", str(folder))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


class RankPool:
    """This process is rank 0 of every engine; there are ``num_followers`` others, with Triton's
    interpreter if they are ``interpreted``."""

    def __init__(self, num_followers: int, *, interpreted: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        """To the others; they serve whoever leads on them, one engine after the other."""
        self._processes = []
        for _ in range(num_followers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs,), kwargs={"interpreted": interpreted}, daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self._processes.append(process)

    def engine(
        self,
        model: Path | str,
        parallel: Parallelism,
        *,
        dtype: str = "float32",
        quantization: Quantization = "none",
        gpu: GpuPlan | None = None,
    ) -> contextlib.AbstractContextManager[Engine]:
        """An engine on the first ``parallel.num_ranks`` ranks, which are free again after it."""
        return leads(
            self.connections,
            str(model),
            parallel,
            dtype=dtype,
            quantization=quantization,
            gpu=gpu,
        )

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            assert process.exitcode == 0
