"""The composition root of a pool controller of its own: ``python -m cluster.controller_main``."""

from __future__ import annotations

import os

# gRPC's C core (Ray Client) writes to standard error by itself, and reads this when loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from baton.config import BatonConfig, load_config
from baton.credentials import CLUSTER_SECRET, CONTROLLER_TOKEN, take_credential
from baton.errors import BatonError, ConfigurationError
from baton.logs import configure
from baton.worker.process import required_environment
from cluster import preflight
from cluster.backend import PoolBackend
from cluster.commands import MODULES, Commands
from cluster.processes_backend import ProcessesBackend
from cluster.standalone import control
from cluster.state import RunFolder

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.controller_main",
        description="The pool controller as a process of its own: starts, replaces and scales "
        "the workers of a cluster whose gateways and Redis run elsewhere. BATON_SECRET, "
        f"REDIS_URL and {CONTROLLER_TOKEN} come from the environment.",
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML configuration file")
    return parser


def _token() -> str:
    token = take_credential(CONTROLLER_TOKEN)  # no worker has to know it
    if token is None:
        raise ConfigurationError(
            f"{CONTROLLER_TOKEN} is not set; it is what `baton scale` has to show"
        )
    return token


def _ray_backend(
    config: BatonConfig, secret: str, redis_url: str, on_connected: Callable[[], None]
) -> PoolBackend:
    if config.cluster.ray_address is None:
        raise ConfigurationError(
            "cluster.ray_address is not set; a controller of its own starts no Ray: give the "
            "address of one, such as ray://HOST:10001",
            param="cluster.ray_address",
        )
    from cluster.ray_backend import RayBackend

    return RayBackend(
        config, secret=secret, redis_url=redis_url, keep=True, on_connected=on_connected
    )


def _processes_backend(commands: Commands) -> PoolBackend:
    """Its workers are children of this process, and end with it."""
    logs = RunFolder(commands.config.registry.cluster).logs
    try:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the workers' logs to {logs}: {error.strerror}; choose another "
            "place with BATON_STATE_DIR"
        ) from None
    return ProcessesBackend(commands.worker, log_folder=logs)


async def run(config_file: Path, *, modules: Mapping[str, str] = MODULES) -> tuple[str, bool]:
    """Controls the pools until a signal. Returns why it could not go on, empty after a
    signal, and whether every library has let go. Raises BatonError before anything began."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def take_signals() -> None:  # also from Ray, which has handlers of its own
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)

    take_signals()
    config = load_config(config_file)
    preflight.check_pools(config)
    preflight.check_gpus(config)
    secret = required_environment(CLUSTER_SECRET)
    redis_url, token = required_environment("REDIS_URL"), _token()
    if config.cluster.backend == "ray":
        backend = _ray_backend(config, secret, redis_url, take_signals)
    else:
        backend = _processes_backend(Commands(config, config_file, secret, redis_url, modules))
    failure = ""
    with preflight.listen_for_controller(config.controller) as listener:
        try:
            await control(
                config,
                backend=backend,
                redis_url=redis_url,
                token=token,
                listener=listener,
                stop=stop,
            )
        except BatonError as error:
            failure = error.message
    try:
        async with asyncio.timeout(config.cluster.stop_timeout_s):
            clean = await backend.close()
    except TimeoutError:
        clean = False
    return failure, clean


def main() -> None:
    """Runs one controller to its end; a failure is one sentence and exit status 1."""
    arguments = _parser().parse_args()
    try:
        configure("controller")
        failure, clean = asyncio.run(run(arguments.config.absolute()))
    except BatonError as error:
        failure, clean = error.message, True
    if failure:
        print(failure, file=sys.stderr, flush=True)
    else:
        logger.info("the controller has stopped")
    if not clean:
        os._exit(1 if failure else 0)  # a thread may hang in Ray
    sys.exit(1 if failure else 0)


if __name__ == "__main__":
    main()
