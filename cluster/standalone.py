"""A pool controller that is a process of its own.

1. WAITING: another controller has the lease; ``/ready`` says so with 503.
2. CONTROLLING: the workers that an earlier controller left are adopted, and stored
   wishes honoured.
3. OVER: it was asked to stop, or the lease or the backend is lost. With a backend
   that keeps them, the workers go on running, for the next controller to adopt.
"""

from __future__ import annotations

import asyncio
import logging
import socket

from prometheus_client import CollectorRegistry

from baton.config import BatonConfig
from baton.errors import UnavailableError
from baton.telemetry import ControllerMetrics
from cluster.backend import PoolBackend
from cluster.controller import PoolController
from cluster.controller_app import Seat, create_controller_app
from cluster.controller_store import ControllerStore
from cluster.lease import Lease, own_name
from router.http_server import HttpServer, url_of

logger = logging.getLogger(__name__)


async def control(
    config: BatonConfig,
    *,
    backend: PoolBackend,
    redis_url: str,
    token: str,
    listener: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Runs one controller on ``listener`` until ``stop`` is set, and then lets go of its
    workers; ``backend`` is the caller's. Raises BatonError when it cannot go on."""
    samples = CollectorRegistry()
    store = ControllerStore(redis_url, config.registry.cluster)
    lease = Lease(store, config.registry, own_name())
    controller = PoolController(
        config,
        backend=backend,
        store=store,
        metrics=ControllerMetrics(samples),
        is_sole=lambda: lease.fresh,
    )
    seat = Seat()
    app = create_controller_app(seat, token=token, samples=samples)
    try:
        async with HttpServer(app).running(listener) as server:
            print(f"controller listening on {url_of(listener)}", flush=True)
            work = asyncio.create_task(_work(controller, lease, seat, backend))
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({work, server, stopped}, return_when=asyncio.FIRST_COMPLETED)
                reason = await _ended(work)
            finally:
                stopped.cancel()
                seat.controller, seat.reason = None, "this controller is going away"
                await controller.close()
    finally:
        await lease.close()
        await store.close()
    if not stop.is_set():
        raise UnavailableError(f"{reason}; this controller ends, its workers run on")


async def _work(controller: PoolController, lease: Lease, seat: Seat, backend: PoolBackend) -> str:
    """From the waiting for the lease to its loss, or to that of the backend: says which."""

    def waiting(reason: str) -> None:
        seat.reason = f"not controlling: {reason}"

    await lease.acquire(waiting)
    seat.reason = "this controller is taking the pools up"
    losses = [asyncio.create_task(lease.wait_lost())]
    begun = asyncio.create_task(controller.begin(anew=False))
    try:
        await asyncio.wait({begun, *losses}, return_when=asyncio.FIRST_COMPLETED)
        if not losses[0].done():
            begun.result()
            seat.controller = controller
            logger.info("controlling the pools")
            losses.append(asyncio.create_task(backend.wait_lost()))
            await asyncio.wait(losses, return_when=asyncio.FIRST_COMPLETED)
        return next(loss.result() for loss in losses if loss.done())
    finally:
        for task in (begun, *losses):
            task.cancel()
        await asyncio.gather(begun, *losses, return_exceptions=True)


async def _ended(work: asyncio.Task[str]) -> str:
    """What it ended with. Raises what it raised."""
    if work.done():
        return work.result()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return "the HTTP server has ended"
