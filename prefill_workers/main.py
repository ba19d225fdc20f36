"""The composition root of a prefill worker: ``python -m prefill_workers.main``."""

from __future__ import annotations

import asyncio
import os

from baton.config import BatonConfig
from baton.worker.address import advertised_host
from baton.worker.process import run
from engine.setup import plan_engine
from engine.worker_parts import WorkerParts
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory
from kv_transfer.service import KvSender
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
        KvMemory, plan.layout.num_bytes, sealed=plan.parallel.num_ranks == 1
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

    sender = KvSender(
        worker_id=worker_id,
        epoch=parts.identity.epoch,
        digest=plan.digest,
        generation=config.generation,
        layout=plan.layout,
        memory=memory,
        secret=secret,
        config=config.kv_transfer,
        metrics=parts.metrics,
        faults=parts.faults,
        on_freed=on_freed,
        host=host,
    )
    worker = PrefillWorker(
        engine=parts.engine,
        scheduler=PrefillScheduler(
            parts.engine.kv,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
        ),
        sender=sender,
        inbox=parts.inbox,
        outbox=parts.outbox,
        metrics=parts.metrics,
        faults=parts.faults,
        config=config.engine,
    )
    server = parts.session_server(PrefillService(worker, parts), secret=secret)
    sender.register(server)
    await sender.start()
    try:
        await parts.host(worker, redis_url=redis_url).run(server, advertise_host=host, stop=stop)
    finally:
        await sender.close()
        await parts.close()


if __name__ == "__main__":
    run("prefill", serve)
