"""The command line of a worker process: the same for both pools."""

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

from baton.config import load_config
from baton.errors import BatonError, ConfigurationError
from baton.logs import configure

logger = logging.getLogger(__name__)

Serve = Callable[..., Awaitable[None]]


def _parser(role: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {role}_workers.main",
        description=f"One {role} worker. BATON_SECRET and REDIS_URL come from the environment.",
    )
    parser.add_argument("--worker-id", required=True, help="unique name, such as prefill-0")
    parser.add_argument("--config", type=Path, help="YAML or JSON configuration file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--metrics-port", type=int, default=0, help="0 takes a free one")
    return parser


def required_environment(name: str) -> str:
    """Raises ConfigurationError that says what the variable is for."""
    value = os.environ.get(name, "")
    if not value:
        purpose = {
            "BATON_SECRET": "the secret that all processes of the cluster share",
            "REDIS_URL": "the Redis that holds the registry, redis://…",
        }[name]
        raise ConfigurationError(f"{name} is not set; it is {purpose}")
    return value


async def _main(role: str, serve: Serve, arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(
        load_config(arguments.config),
        worker_id=arguments.worker_id,
        host=arguments.host,
        port=arguments.port,
        metrics_port=arguments.metrics_port,
        secret=required_environment("BATON_SECRET"),
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
