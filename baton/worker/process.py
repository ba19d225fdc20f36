"""The command line of a worker process and the frame of its life: the same for both roles."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from baton.config import BatonConfig, load_config
from baton.credentials import CLUSTER_SECRET, credential
from baton.errors import BatonError, ConfigurationError
from baton.logs import configure
from baton.worker.leave import stay

logger = logging.getLogger(__name__)

Serve = Callable[..., Awaitable[None]]


def _parser(role: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {role}_workers.main",
        description=f"One {role} worker. BATON_SECRET and REDIS_URL come from the environment.",
    )
    parser.add_argument("--worker-id", required=True, help="unique name, such as prefill-0")
    parser.add_argument("--pool", default=role, help="whose settings it has; default: %(default)s")
    parser.add_argument("--config", type=Path, help="YAML or JSON configuration file")
    parser.add_argument("--host", help="in place of worker.host")
    parser.add_argument("--port", type=int, help="in place of worker.port")
    parser.add_argument("--metrics-port", type=int, help="in place of worker.metrics_port")
    return parser


def required_environment(name: str) -> str:
    """Without the whitespace around it. Raises ConfigurationError that says what the variable
    is for, or why a secret can be none."""
    value = credential(name) if name == CLUSTER_SECRET else os.environ.get(name, "").strip()
    if not value:
        purpose = {
            CLUSTER_SECRET: "the secret that all processes of the cluster share",
            "REDIS_URL": "the Redis that holds the registry, redis://…",
        }[name]
        raise ConfigurationError(f"{name} is not set; it is {purpose}")
    return value


def pool_config(config: BatonConfig, *, role: str, pool: str) -> BatonConfig:
    """What a worker of that role goes by in that pool. Raises ConfigurationError."""
    own = config.for_pool(pool)
    if (actual := config.pools[pool].role) != role:
        raise ConfigurationError(
            f"pool {pool} is of role {actual}, and this is a {role} worker; "
            f"start {actual}_workers.main for it"
        )
    return own


async def live(
    serve: Serve,
    config: BatonConfig,
    *,
    role: str,
    pool: str,
    worker_id: str,
    secret: str,
    redis_url: str,
    stop: asyncio.Event,
) -> None:
    """One worker's whole life on this event loop. ``stop`` asks for its end, as leaving
    this node does. Raises what ``serve`` raises, and BatonError when it may not start."""
    own = pool_config(config, role=role, pool=pool)
    async with stay(worker_id, stop):
        await serve(own, worker_id=worker_id, secret=secret, redis_url=redis_url, stop=stop)


def _config(arguments: argparse.Namespace) -> BatonConfig:
    """The file's, with what the command line says in place of it for this pool."""
    config = load_config(arguments.config)
    config.for_pool(arguments.pool)
    names = ("host", "port", "metrics_port")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if not given:
        return config
    return load_config(arguments.config, {"pools": {arguments.pool: {"worker": given}}})


async def _main(role: str, serve: Serve, arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await live(
        serve,
        _config(arguments),
        role=role,
        pool=arguments.pool,
        worker_id=arguments.worker_id,
        secret=required_environment(CLUSTER_SECRET),
        redis_url=required_environment("REDIS_URL"),
        stop=stop,
    )


def run(role: str, serve: Serve) -> None:
    """Runs one worker to its end; a failure is one line and exit status 1."""
    arguments = _parser(role).parse_args()
    try:
        configure(arguments.worker_id)
        uvloop.run(_main(role, serve, arguments))
    except BatonError as error:
        logger.error("%s: %s", error.code, error.message)
        sys.exit(1)
