"""A real Redis for one test: private, on a port of its own, with a password."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from cluster.redis_server import find_redis_server, free_port

START_S = 10.0


class RedisServer:
    """Can be stopped and started again on the same port, empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._password = secrets.token_hex(8)
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Returns once it takes connections."""
        self._process = subprocess.Popen(
            [
                find_redis_server(),
                *("--bind", "127.0.0.1", "--port", str(self._port)),
                *("--requirepass", self._password, "--dir", str(self._folder)),
                *("--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
        )
        ends_at = time.monotonic() + START_S
        while True:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port), timeout=1),
            ):
                return
            assert self._process.poll() is None, "redis-server ended at once"
            assert time.monotonic() < ends_at, "redis-server does not take connections"
            time.sleep(0.01)

    def refuse_writes(self, refuse: bool) -> None:
        """As a Redis does that became read-only, or whose disk is full: it answers reads."""
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            client.config_set("min-replicas-to-write", int(refuse))

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """A running server, killed at the end; ``folder`` is its working folder."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
