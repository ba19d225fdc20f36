"""The pool controller inside `baton serve`: its lease, its pools and its HTTP server.

It is told the sizes of the command line, whatever Redis holds, and stops its workers
with everything else; a controller of its own (``controller_main``) does neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from baton.config import BatonConfig
from baton.errors import UnavailableError
from baton.telemetry import ControllerMetrics
from cluster.backend import PoolBackend
from cluster.controller import PoolController, PoolStatus
from cluster.controller_store import ControllerStore
from cluster.lease import Lease, own_name
from cluster.slots import WorkerEvent


class EmbeddedController:
    """Answers on ``listener``, which stays its owner's, from ``start`` to ``close_api``."""

    def __init__(
        self,
        config: BatonConfig,
        *,
        listener: socket.socket,
        token: str,
        redis_url: str,
        backend: PoolBackend,
        on_event: Callable[[WorkerEvent], None],
    ) -> None:
        self._config = config
        self._listener = listener
        self._token = token
        self._samples = CollectorRegistry()
        self._store = ControllerStore(redis_url, config.registry.cluster)
        self._lease = Lease(self._store, config.registry, own_name())
        self._controller = PoolController(
            config,
            backend=backend,
            store=self._store,
            metrics=ControllerMetrics(self._samples),
            on_event=on_event,
            is_sole=lambda: self._lease.fresh,
        )
        self._server = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Begins with the configured sizes; Redis must answer. Raises UnavailableError
        where another controller has the pools of that name there."""
        await self._take_lease()
        await self._controller.begin(anew=True)
        # FastAPI takes its time; meanwhile the workers are being started.
        await asyncio.to_thread(importlib.import_module, "cluster.controller_app")
        from cluster.controller_app import Seat, create_controller_app
        from router.http_server import HttpServer

        app = create_controller_app(
            Seat(self._controller), token=self._token, samples=self._samples
        )
        await self._server.enter_async_context(HttpServer(app).running(self._listener))

    async def _take_lease(self) -> None:
        """Waits as long as the lease of a launcher that was killed may last."""
        reasons: list[str] = []
        registry = self._config.registry
        try:
            async with asyncio.timeout(registry.ttl_s + 2 * registry.heartbeat_s):
                await self._lease.acquire(reasons.append)
        except TimeoutError:
            raise UnavailableError(
                f"{reasons[-1] if reasons else 'Redis does not answer'}; clusters that share a "
                "Redis need different names: choose one with --cluster"
            ) from None

    def sizes(self) -> Mapping[str, PoolStatus]:
        """The pools as they are and should be now."""
        return self._controller.pools()

    async def wait_lost(self) -> str:
        """Returns once another controller has taken the pools over, saying so; not
        before ``start`` has returned."""
        return await self._lease.wait_lost()

    async def close_api(self) -> None:
        """No wish is taken any more, and no worker replaced."""
        await self._controller.close()
        await self._server.aclose()

    async def stop_workers(self, *, limit_s: float, hurry: asyncio.Event) -> int:
        """See ``Reconciler.stop``."""
        return await self._controller.stop_workers(limit_s=limit_s, hurry=hurry)

    async def close(self) -> None:
        """Lets another controller in. Before Redis is gone, if it is ours."""
        await self._lease.close()
        await self._store.close()
