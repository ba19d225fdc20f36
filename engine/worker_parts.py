"""What every worker process is made of, whichever pool it is in.

A pool's ``main.py`` adds its scheduler, its worker and its side of the hand-off.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc.aio
import torch
from prometheus_client import CollectorRegistry, generate_latest

from baton.config import BatonConfig
from baton.faults import Faults
from baton.protocol import new_epoch
from baton.records import Role
from baton.rpc import server
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2_grpc
from baton.worker.host import Identity, LoopWorker, WorkerHost, report_from
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.session_server import SessionHandler, SessionServer
from engine.engine import Engine
from engine.native.kernels import use_kernels
from engine.parallel.followers import Followers, RankTask
from engine.parallel.rank_processes import RankProcesses
from engine.setup import EnginePlan

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def _in_own_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Like ``asyncio.to_thread``, in a thread that ends with the call.

    Each thread that computes has OpenMP threads of its own, for as long as it lives. Where all
    of them are more than there are cores, libgomp lets none of them wait awake between two
    operators: a decode step then took 18 ms where it takes 12 (one stream on two cores).
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="load")
    try:
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(executor, call)
    finally:
        executor.shutdown(wait=False)


class Ranks:
    """The ranks of this worker beside this process: their processes, and their work."""

    def __init__(self, task: RankTask, worker_id: str, memory_fd: int | None) -> None:
        """Returns once all have come. Raises ConfigurationError."""
        log_ranks(worker_id, task)
        self._processes = RankProcesses(task.parallel.num_ranks - 1, worker_id=worker_id)
        self.followers = Followers.lead(self._processes.connections, task, memory_fd)

    def close(self) -> None:
        """Ends them within seconds, also where one of them hangs."""
        self._processes.expect_end()
        self.followers.close()
        self._processes.close()


def log_ranks(worker_id: str, task: RankTask) -> None:
    """How many compute with how many threads, and whether they have a core each."""
    num_ranks, num_cores = task.parallel.num_ranks, len(os.sched_getaffinity(0))
    logger.info("%s: %d ranks of %d threads each", worker_id, num_ranks, task.threads)
    if num_ranks * task.threads > num_cores:
        logger.warning(
            "%s: %d ranks of %d threads each share %d cores, and all wait for the slowest at "
            "every layer; give it more cores, fewer ranks or a lower engine.threads",
            worker_id, num_ranks, task.threads, num_cores,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """Made once, by ``build``, on the event loop that the worker will run on."""

    config: BatonConfig
    plan: EnginePlan
    engine: Engine
    ranks: Ranks | None
    identity: Identity
    registry: CollectorRegistry
    metrics: WorkerMetrics
    faults: Faults
    inbox: Inbox
    outbox: Outbox

    @classmethod
    async def build(
        cls,
        config: BatonConfig,
        plan: EnginePlan,
        memory: memoryview | torch.Tensor,
        *,
        memory_fd: int | None,
        worker_id: str,
        role: Role,
    ) -> WorkerParts:
        """Loads the weights, in a thread. ``memory`` is the KV pool's, kept by the caller;
        other ranks have mapped ``memory_fd`` when this returns. On GPUs it is this rank's own
        pool, ``plan.gpu_memory``.

        Raises CheckpointError for weights that cannot be loaded, ConfigurationError where a GPU
        has too little memory.
        """
        ranks = None
        choice = plan.cpu_kernels if plan.gpu is None else "torch"
        cpu_kernels = await asyncio.to_thread(use_kernels, choice)
        if plan.parallel.num_ranks > 1:
            ranks = await asyncio.to_thread(
                Ranks, plan.rank_task(config, cpu_kernels), worker_id, memory_fd
            )
        try:
            engine = await _in_own_thread(
                Engine,
                plan.checkpoint,
                dtype=plan.dtype,
                layout=plan.engine_layout,
                memory=memory,
                domain=plan.domain,
                threads=plan.threads,
                cpu_kernels=cpu_kernels,
                quantization=plan.quantization,
                followers=ranks.followers if ranks is not None else None,
                gpu=plan.gpu,
            )
        except BaseException:
            if ranks is not None:
                await asyncio.to_thread(ranks.close)
            raise
        engine.kv.pool.watch()
        registry = CollectorRegistry()
        metrics = WorkerMetrics(registry, worker_id=worker_id, role=role)
        inbox = Inbox(asyncio.get_running_loop())
        identity = Identity(
            worker_id=worker_id,
            role=role,
            epoch=new_epoch(),
            model=plan.served_name,
            digest=plan.digest,
            block_size=plan.layout.block_size,
            num_blocks=plan.layout.num_blocks,
            max_model_len=plan.max_model_len,
            kv_dtype=plan.layout.dtype,
            generation=config.generation,
            num_ranks=plan.parallel.num_ranks,
        )
        return cls(
            config=config,
            plan=plan,
            engine=engine,
            ranks=ranks,
            identity=identity,
            registry=registry,
            metrics=metrics,
            faults=Faults.from_environment(worker_id),
            inbox=inbox,
            outbox=Outbox(inbox, metrics),
        )

    async def close(self) -> None:
        """Ends the other ranks, after the last step."""
        if self.ranks is not None:
            await asyncio.to_thread(self.ranks.close)

    def session_server(self, handler: SessionHandler, *, secret: str) -> grpc.aio.Server:
        """A server, not started, on which gateways open Sessions with ``handler``."""
        sessions = SessionServer(
            welcome=self.identity.welcome(),
            handler=handler,
            report=lambda session: report_from(
                self.outbox, generate_latest(self.registry), session=session
            ),
            config=self.config.session,
        )
        self.outbox.deliver = sessions.deliver
        grpc_server = server(secret, self.config.session)
        session_pb2_grpc.add_WorkerServicer_to_server(sessions, grpc_server)
        return grpc_server

    def host(self, worker: LoopWorker, *, redis_url: str) -> WorkerHost:
        """The life of a process that runs ``worker``."""
        return WorkerHost(
            config=self.config,
            identity=self.identity,
            worker=worker,
            inbox=self.inbox,
            registry=self.registry,
            redis_url=redis_url,
        )
