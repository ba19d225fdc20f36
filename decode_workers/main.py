"""The composition root of a decode worker: ``python -m decode_workers.main``."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, generate_latest

from baton.config import BatonConfig
from baton.errors import BatonError
from baton.faults import Faults
from baton.protocol import new_epoch
from baton.rpc import server as grpc_server
from baton.telemetry import WorkerMetrics
from baton.v1 import session_pb2_grpc
from baton.worker.host import Identity, WorkerHost, report_from
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.process import run
from baton.worker.session_server import SessionServer
from decode_workers.scheduler import DecodeScheduler
from decode_workers.service import DecodeService
from decode_workers.worker import DecodeWorker
from engine.engine import Engine
from engine.setup import EnginePlan, plan_engine
from kv_transfer.client import KvReceiver
from kv_transfer.keys import TransferKey
from kv_transfer.memory import KvMemory


def _build_engine(plan: EnginePlan) -> tuple[Engine, KvMemory]:
    memory = KvMemory(plan.layout.num_bytes)
    engine = Engine(
        plan.checkpoint,
        dtype=plan.dtype,
        layout=plan.layout,
        memory=memory.buffer,
        domain=plan.domain,
        threads=plan.threads,
    )
    return engine, memory


async def serve(
    config: BatonConfig,
    *,
    worker_id: str,
    host: str,
    port: int,
    metrics_port: int,
    secret: str,
    redis_url: str,
    stop: asyncio.Event,
) -> None:
    """Runs one decode worker until ``stop`` is set.

    Raises CheckpointError, ConfigurationError before it is registered, and
    InternalError when its engine dies.
    """
    plan = await asyncio.to_thread(plan_engine, config, secret=secret)
    engine, memory = await asyncio.to_thread(_build_engine, plan)
    epoch = new_epoch()
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, worker_id=worker_id, role="decode")
    faults = Faults.from_environment(worker_id)
    inbox = Inbox(asyncio.get_running_loop())
    outbox = Outbox(inbox, metrics)

    def on_ready(transfer: TransferKey, token_id: int, position: int, num_received: int) -> None:
        inbox.post(worker.handed_over, transfer, token_id, position, num_received)

    def on_failed(transfer: TransferKey, error: BatonError) -> None:
        inbox.post(worker.handoff_failed, transfer, error)

    def on_drained(transfer: TransferKey) -> None:
        inbox.post(worker.drained, transfer)

    receiver = KvReceiver(
        worker_id=worker_id,
        epoch=epoch,
        digest=plan.digest,
        generation=config.generation,
        layout=plan.layout,
        memory=memory,
        secret=secret,
        config=config.kv_transfer,
        session=config.session,
        metrics=metrics,
        faults=faults,
        on_ready=on_ready,
        on_failed=on_failed,
        on_drained=on_drained,
    )
    worker = DecodeWorker(
        engine=engine,
        scheduler=DecodeScheduler(
            engine.kv,
            max_num_batched_tokens=config.engine.max_num_batched_tokens,
            max_num_seqs=config.engine.max_num_seqs,
            watermark_blocks=max(1, plan.layout.num_blocks // 100),
        ),
        receiver=receiver,
        inbox=inbox,
        outbox=outbox,
        metrics=metrics,
        faults=faults,
        config=config.engine,
        transfer_config=config.kv_transfer,
    )
    identity = Identity(
        worker_id=worker_id,
        role="decode",
        epoch=epoch,
        model=plan.served_name,
        digest=plan.digest,
        block_size=plan.layout.block_size,
        num_blocks=plan.layout.num_blocks,
        max_model_len=plan.max_model_len,
        generation=config.generation,
    )
    sessions = SessionServer(
        welcome=identity.welcome(),
        handler=DecodeService(worker=worker, plan=plan, epoch=epoch, inbox=inbox, outbox=outbox),
        report=lambda: report_from(outbox, generate_latest(registry)),
        config=config.session,
    )
    outbox.deliver = sessions.deliver
    server = grpc_server(secret, config.session)
    session_pb2_grpc.add_WorkerServicer_to_server(sessions, server)
    await receiver.start()
    try:
        await WorkerHost(
            config=config,
            identity=identity,
            worker=worker,
            inbox=inbox,
            registry=registry,
            redis_url=redis_url,
        ).run(server, host=host, port=port, metrics_port=metrics_port, stop=stop)
    finally:
        await receiver.close()


if __name__ == "__main__":
    run("decode", serve)
