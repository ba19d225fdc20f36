"""The pool of workers as the status pages show it."""

from __future__ import annotations

import asyncio

from baton.records import Role
from baton.v1 import session_pb2 as pb
from router.routing.kv_index import KvIndex
from router.routing.policy import PeerLoad, PeerShare
from router.status import ClusterStatus, WorkerStatus
from router.workers.link import WorkerLink
from router.workers.pool import WorkerPool


def _worker_status(
    link: WorkerLink, index: KvIndex, peers: PeerLoad | None, now: float
) -> WorkerStatus:
    record, session = link.record, link.session
    epoch = bytes.fromhex(record.epoch)
    report = (session.report if session else None) or pb.Report()
    reported_at = session.reported_at if session else None
    load_at = session.load_at if session else None
    share = PeerShare() if peers is None else peers.since(epoch, load_at)
    return WorkerStatus(
        worker_id=record.worker_id,
        role=record.role,
        epoch=record.epoch,
        address=record.address,
        ready=link.ready,
        model=record.model,
        num_running=report.num_running,
        num_waiting=report.num_waiting,
        num_free_blocks=report.blocks.free,
        num_cached_blocks=report.blocks.cached,
        num_referenced_blocks=report.blocks.referenced,
        num_quarantined_blocks=report.blocks.quarantined,
        num_blocks=record.num_blocks,
        block_size=record.block_size,
        max_model_len=record.max_model_len,
        generation=record.generation,
        num_ranks=record.num_ranks,
        num_indexed_blocks=index.num_indexed_blocks(epoch),
        draining=link.draining,
        num_peer_sequences=share.num_sequences,
        num_peer_tokens=share.num_tokens,
        num_peer_blocks=share.num_blocks,
        last_report_age_s=None if reported_at is None else now - reported_at,
    )


def _none_ready(role: Role, pool: WorkerPool) -> str:
    strangers = pool.strangers(role)
    return f"No {role} worker is ready{'' if strangers is None else f': {strangers}'}."


def _prefill_too_short(workers: tuple[WorkerStatus, ...]) -> str | None:
    """A sentence where decode workers hold longer prompts than any prefill worker."""
    ready = ClusterStatus(workers, registry_up=True)
    prefill, decode = ready.longest("prefill"), ready.longest("decode")
    if prefill is None or decode is None or prefill >= decode:
        return None
    return (
        f"No prefill worker that is ready holds a prompt of more than {prefill - 1} tokens: "
        f"decode workers, which hold {decode}, prefill longer ones by themselves."
    )


def cluster_status(
    pool: WorkerPool,
    *,
    registry_up: bool,
    prefill_wanted: bool,
    gateways: tuple[str, ...] = (),
    peers: PeerLoad | None = None,
    peers_up: bool = True,
) -> ClusterStatus:
    """All workers that are known, and in words what keeps them from serving, or serving well."""
    now = asyncio.get_running_loop().time()
    workers = tuple(_worker_status(link, pool.index, peers, now) for link in pool.links)
    ready_roles = {worker.role for worker in workers if worker.ready}
    lacks = []
    if prefill_wanted and "prefill" not in ready_roles:
        lacks.append(_none_ready("prefill", pool))
    if (misfits := pool.without_partner()) is not None:
        lacks.append(misfits)
    if (too_short := _prefill_too_short(workers)) is not None:
        lacks.append(too_short)
    if not registry_up:
        lacks.append("The registry (Redis) does not answer.")
    if not peers_up:
        lacks.append("Load is not shared with other gateways: Redis does not answer.")
    # Decode workers prefill by themselves where they must, and what is known stays known
    # without Redis: with a decode worker there is an answer, if a slower one.
    missing = [] if "decode" in ready_roles else [_none_ready("decode", pool), *lacks]
    degraded = [] if missing else lacks
    return ClusterStatus(
        workers=workers,
        registry_up=registry_up,
        missing=tuple(missing),
        degraded=tuple(degraded),
        recent_max_model_len=pool.recent_max_model_len(),
        gateways=gateways,
    )
