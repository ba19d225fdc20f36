"""The gateway's HTTP server: uvicorn, run inside our event loop and ended by us."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from baton.errors import ConfigurationError
from router.gateway.lifecycle import Lifecycle

KEEP_ALIVE_S = 65
"""How long an idle client connection stays open: longer than common load balancers' 60 s."""
LAST_WORDS_S = 2.0
"""For the errors of requests that were cut off to reach their clients."""
BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in its backlog until the server runs.

    Raises: ConfigurationError, in a sentence, when the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --host and "
            "--port, or gateway.host and gateway.port",
            param="gateway.port",
        ) from None


def url_of(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """Leaves signals to the process's main."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(LAST_WORDS_S),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @contextlib.asynccontextmanager
    async def running(self, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
        """Serves while the block runs; the task ends early only if the server fails."""
        task = asyncio.create_task(self.serve(sockets=[listener]), name="http server")
        try:
            yield task
        finally:
            self.should_exit = True
            await task


async def drain(lifecycle: Lifecycle, bound_s: float) -> None:
    """Refuses new requests and lets running ones go on for at most ``bound_s``; what is
    left then is told that the gateway goes away."""
    lifecycle.begin_drain()
    try:
        async with asyncio.timeout(bound_s):
            await lifecycle.wait_idle()
    except TimeoutError:
        lifecycle.refuse_running()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await lifecycle.wait_idle()
