"""The composition root of a prefill worker: ``python -m prefill_workers.main``."""

from __future__ import annotations

import asyncio
import os
import time

from baton.config import BatonConfig
from baton.errors import BatonError
from baton.heap import leave_to_last
from baton.worker.address import advertised_host
from baton.worker.process import run
from engine.native.copies import native_copies
from engine.setup import plan_engine
from engine.worker_parts import WorkerParts
from kv_transfer.ends import HandoffEnds
from kv_transfer.gpu_memory import pool_memory
from kv_transfer.keys import TransferKey
from prefill_workers.pull_costs import PullCosts
from prefill_workers.pulls import Pulls
from prefill_workers.scheduler import PrefillScheduler
from prefill_workers.service import PrefillService
from prefill_workers.worker import PrefillWorker


async def serve(
    config: BatonConfig,
    *,
    worker_id: str,
    secret: str,
    redis_url: str,
    stop: asyncio.Event,
) -> None:
    """Runs one prefill worker until ``stop`` is set, as ``config.worker`` says.

    Raises CheckpointError, ConfigurationError before it is registered, and
    InternalError when its engine dies.
    """
    host = advertised_host(config.worker.host, os.environ)
    plan = await asyncio.to_thread(
        plan_engine, config, secret=secret, parallel=config.own_parallelism
    )
    memory = await asyncio.to_thread(
        pool_memory,
        plan.layout.num_bytes,
        on_gpu=plan.gpu_memory,
        sealed=plan.parallel.num_ranks == 1,
    )
    parts = await WorkerParts.build(
        config,
        plan,
        memory.buffer,
        memory_fd=memory.fd,
        worker_id=worker_id,
        role="prefill",
    )
    memory.seal()

    def on_freed(transfer: TransferKey, outcome: str) -> None:
        parts.inbox.post(worker.freed, transfer, outcome)

    def on_pulled(transfer: TransferKey, *first_token: object) -> None:
        parts.inbox.post(worker.pulled, transfer, time.monotonic())

    def on_pull_failed(transfer: TransferKey, error: BatonError) -> None:
        parts.inbox.post(pulls.failed, transfer, time.monotonic())

    def on_pull_drained(transfer: TransferKey) -> None:
        parts.inbox.post(pulls.drained, transfer)

    ends = HandoffEnds(
        worker_id=worker_id,
        epoch=parts.identity.epoch,
        digest=plan.digest,
        generation=config.generation,
        layout=plan.engine_layout,
        memory=memory,
        secret=secret,
        config=config.kv_transfer,
        session=config.session,
        metrics=parts.metrics,
        faults=parts.faults,
        host=host,
        on_fatal=parts.inbox.fail,
        copy_blocks=native_copies(),
    )
    sender = ends.sender(on_freed=on_freed)
    puller = ends.puller(on_ready=on_pulled, on_failed=on_pull_failed, on_drained=on_pull_drained)
    costs = PullCosts(
        block_size=plan.layout.block_size,
        token_bytes=plan.layout.token_bytes,
        step_tokens=config.engine.max_num_batched_tokens,
    )
    scheduler = PrefillScheduler(
        parts.engine.kv,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        max_num_seqs=config.engine.max_num_seqs,
        moving_pays=costs.moving_pays,
    )
    pulls = Pulls(parts.engine.kv, puller, parts.inbox, scheduler=scheduler, costs=costs)
    worker = PrefillWorker(
        engine=parts.engine,
        scheduler=scheduler,
        sender=sender,
        pulls=pulls,
        inbox=parts.inbox,
        outbox=parts.outbox,
        metrics=parts.metrics,
        faults=parts.faults,
        config=config.engine,
    )
    server = parts.session_server(PrefillService(worker, parts), secret=secret)
    sender.register(server)
    await sender.start()
    await puller.start()
    leave_to_last()
    try:
        await parts.host(worker, redis_url=redis_url).run(server, advertise_host=host, stop=stop)
    finally:
        await puller.close()
        await sender.close()
        await parts.close()


if __name__ == "__main__":
    run("prefill", serve)
