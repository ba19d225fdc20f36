"""The composition root of a decode worker: ``python -m decode_workers.main``."""

from __future__ import annotations

import asyncio
import os

from baton.config import BatonConfig
from baton.errors import BatonError
from baton.heap import leave_to_last
from baton.logprobs import TokenLogprobs
from baton.worker.address import advertised_host
from baton.worker.process import run
from decode_workers.scheduler import DecodeScheduler
from decode_workers.service import DecodeService
from decode_workers.worker import DecodeWorker
from engine.native.copies import native_copies
from engine.setup import plan_engine
from engine.worker_parts import WorkerParts
from kv_transfer.ends import HandoffEnds
from kv_transfer.gpu_memory import pool_memory
from kv_transfer.keys import TransferKey


async def serve(
    config: BatonConfig,
    *,
    worker_id: str,
    secret: str,
    redis_url: str,
    stop: asyncio.Event,
) -> None:
    """Runs one decode worker until ``stop`` is set, as ``config.worker`` says.

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
        role="decode",
    )
    memory.seal()

    def on_ready(
        transfer: TransferKey,
        token_id: int,
        position: int,
        num_received: int,
        logprobs: TokenLogprobs | None,
    ) -> None:
        parts.inbox.post(worker.handed_over, transfer, token_id, position, num_received, logprobs)

    def on_failed(transfer: TransferKey, error: BatonError) -> None:
        parts.inbox.post(worker.handoff_failed, transfer, error)

    def on_drained(transfer: TransferKey) -> None:
        parts.inbox.post(worker.drained, transfer)

    def on_freed(lend: TransferKey, outcome: str) -> None:
        parts.inbox.post(worker.lends.over, lend)

    def on_wanted(lend: TransferKey, start_token: int) -> None:
        parts.inbox.post(worker.lends.asked, lend, start_token)

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
    receiver = ends.receiver(on_ready=on_ready, on_failed=on_failed, on_drained=on_drained)
    lender = ends.lender(on_freed=on_freed, on_wanted=on_wanted)
    worker = DecodeWorker(
        engine=parts.engine,
        scheduler=DecodeScheduler(
            parts.engine.kv,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            watermark_blocks=max(1, plan.layout.num_blocks // 100),
        ),
        receiver=receiver,
        lender=lender,
        inbox=parts.inbox,
        outbox=parts.outbox,
        metrics=parts.metrics,
        faults=parts.faults,
        config=config.engine,
        transfer_config=config.kv_transfer,
    )
    server = parts.session_server(DecodeService(worker, parts), secret=secret)
    lender.register(server)
    await lender.start()
    await receiver.start()
    leave_to_last()
    try:
        await parts.host(worker, redis_url=redis_url).run(server, advertise_host=host, stop=stop)
    finally:
        await receiver.close()
        await lender.close()
        await parts.close()


if __name__ == "__main__":
    run("decode", serve)
