"""A pool controller that is a process of its own.

1. OPENING: Ray does not answer yet; it is tried again and again.
2. WAITING: another controller has the lease.
3. CONTROLLING: the workers that an earlier controller left are adopted, and stored
   wishes honoured.
4. OVER: it was asked to stop, or the lease or the backend is lost. With a backend
   that keeps them, the workers go on running, for the next controller to adopt.

Until it controls, ``/ready`` says with 503 what it waits for. Ray comes before the
lease: who cannot start workers must not keep a controller that could from taking over.
It costs that one which waits for the lease holds a connection to Ray, and ends when it
is lost, to begin again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from typing import Any

from prometheus_client import CollectorRegistry

from baton.config import BatonConfig
from baton.errors import UnavailableError
from baton.telemetry import ControllerMetrics
from cluster.backend import PoolBackend
from cluster.controller import PoolController
from cluster.controller_app import Seat, create_controller_app
from cluster.controller_store import ControllerStore
from cluster.lease import Lease, own_name
from cluster.slots import backoff_s
from router.http_server import HttpServer, url_of

logger = logging.getLogger(__name__)

_MOST_PAUSE_S = 5.0
"""Between two tries to open the backend."""


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
            work = asyncio.create_task(
                _work(controller, lease, seat, backend, f"Ray at {config.cluster.ray_address}")
            )
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


async def _work(
    controller: PoolController, lease: Lease, seat: Seat, backend: PoolBackend, name: str
) -> str:
    """From the opening of the backend to the loss of the lease or of the backend: says
    which. ``name`` is the backend's."""
    await _open(backend, seat, name)
    lost = asyncio.create_task(backend.wait_lost())
    held = asyncio.create_task(_control(controller, lease, seat))
    try:
        await asyncio.wait({lost, held}, return_when=asyncio.FIRST_COMPLETED)
        return (held if held.done() else lost).result()
    finally:
        await _cancel(lost, held)


async def _open(backend: PoolBackend, seat: Seat, name: str) -> None:
    """Tries for ever, later and later."""
    seat.reason = f"not controlling: waiting for {name}"
    for failures in itertools.count(1):
        try:
            return await backend.open()
        except UnavailableError as error:
            reason = f"not controlling: waiting for {name}: {error.message}"
            if reason != seat.reason:
                logger.warning("%s", reason)
            seat.reason = reason
        await asyncio.sleep(min(backoff_s(failures), _MOST_PAUSE_S))


async def _control(controller: PoolController, lease: Lease, seat: Seat) -> str:
    """From the waiting for the lease to its loss: says who has it."""

    def waiting(reason: str) -> None:
        seat.reason = f"not controlling: {reason}"

    await lease.acquire(waiting)
    seat.reason = "this controller is taking the pools up"
    lost = asyncio.create_task(lease.wait_lost())
    begun = asyncio.create_task(controller.begin(anew=False))
    try:
        await asyncio.wait({begun, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not lost.done():
            begun.result()
            seat.controller = controller
            logger.info("controlling the pools")
        return await lost
    finally:
        await _cancel(begun, lost)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _ended(work: asyncio.Task[str]) -> str:
    """What it ended with. Raises what it raised."""
    if work.done():
        return work.result()
    await _cancel(work)
    return "the HTTP server has ended"
