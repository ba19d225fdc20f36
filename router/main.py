"""The composition root of a gateway: ``python -m router.main``."""

from __future__ import annotations

import os

# gRPC's C core writes to standard error by itself, and reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import argparse
import asyncio
import logging
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import BatonConfig, load_config
from baton.credentials import API_KEY, CLUSTER_SECRET, credential
from baton.errors import BatonError, CheckpointError
from baton.faults import Faults
from baton.heap import leave_to_last, release_free_memory
from baton.logs import configure
from baton.telemetry import GatewayMetrics
from baton.worker.process import required_environment
from router.gateway.app import create_app
from router.gateway.lifecycle import Lifecycle
from router.http_server import HttpServer, drain, listen, url_of
from router.orchestrator import Orchestrator
from router.routing.input_hashes import BlockNames
from router.routing.kv_index import KvIndex
from router.routing.peer_load import SharedLoad
from router.routing.policy import make_policy
from router.workers.handshake import GatewayIdentity
from router.workers.pool import WorkerPool
from router.workers.registry import Registry

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m router.main",
        description="One gateway. BATON_SECRET and REDIS_URL come from the environment; with "
        "BATON_API_KEY set there, clients have to send that key.",
    )
    parser.add_argument("--gateway-id", default="gateway-0", help="unique name of this gateway")
    parser.add_argument("--config", type=Path, help="YAML configuration file")
    parser.add_argument("--host", help="address to listen on, in place of gateway.host")
    parser.add_argument("--port", type=int, help="in place of gateway.port; 0 takes a free one")
    return parser


def _configuration(arguments: argparse.Namespace) -> BatonConfig:
    given: dict[str, Any] = {"host": arguments.host, "port": arguments.port}
    overrides = {key: value for key, value in given.items() if value is not None}
    return load_config(arguments.config, {"gateway": overrides})


def _open_model(config: BatonConfig) -> tuple[Checkpoint, Tokenizer]:
    checkpoint = open_checkpoint(config.model, config.engine.load_format)
    path = checkpoint.folder / "tokenizer.json"
    try:
        return checkpoint, Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from None


async def serve(
    config: BatonConfig,
    *,
    gateway_id: str,
    listener: socket.socket,
    secret: str,
    redis_url: str,
    api_key: str | None,
    stop: asyncio.Event,
) -> None:
    """Runs one gateway on ``listener`` until ``stop`` is set, then drains it.

    Raises: CheckpointError before anything is served.
    """
    checkpoint, tokenizer = await asyncio.to_thread(_open_model, config)
    release_free_memory()
    samples = CollectorRegistry()
    metrics = GatewayMetrics(samples)
    identity = GatewayIdentity(
        gateway_id=gateway_id,
        generation=config.generation,
        model=config.served_model_name or checkpoint.name,
        secret=secret,
    )
    rng = random.Random()
    clock = asyncio.get_running_loop().time
    index = KvIndex(clock)
    names = BlockNames(secret=secret, weights_revision=checkpoint.revision)
    pool = WorkerPool(
        identity=identity,
        config=config.session,
        registry=config.registry,
        metrics=metrics,
        index=index,
        clock=clock,
    )
    registry = Registry(
        redis_url,
        config.registry,
        gateway_id=gateway_id,
        metrics=metrics,
        on_records=pool.update,
    )
    peers = SharedLoad(
        redis_url,
        cluster=config.registry.cluster,
        gateway_id=gateway_id,
        clock=clock,
        knows=pool.knows,
        alone=lambda: registry.gateways == (gateway_id,),
        metrics=metrics,
    )
    orchestrator = Orchestrator(
        config=config,
        pool=pool,
        policy=make_policy(config.routing, index, rng, clock, peers),
        metrics=metrics,
        faults=Faults.from_environment(gateway_id),
        registry_up=lambda: registry.up,
        rng=rng,
        names=names if config.routing.policy == "kv_aware" else None,
        prefill_wanted=lambda: registry.wants("prefill"),
        gateways=lambda: registry.gateways,
        peers=peers,
        peers_up=lambda: peers.up,
    )
    lifecycle = Lifecycle()
    app = create_app(
        config,
        orchestrator,
        tokenizer,
        checkpoint,
        metrics,
        samples,
        lifecycle=lifecycle,
        api_key=api_key,
    )
    leave_to_last()
    try:
        await registry.start()
        peers.start()
        async with HttpServer(app).running(listener) as server:
            print(f"gateway listening on {url_of(listener)}", flush=True)
            await _until_over(stop, server)
            logger.info("draining, for at most %g s", config.gateway.drain_s)
            await drain(lifecycle, config.gateway.drain_s)
    finally:
        await peers.close()
        await registry.close()
        await pool.close()


async def _until_over(stop: asyncio.Event, server: asyncio.Task[None]) -> None:
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopped, server}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()


async def _run(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    config = _configuration(arguments)
    secret = required_environment(CLUSTER_SECRET)
    redis_url = required_environment("REDIS_URL")
    with listen(config.gateway.host, config.gateway.port) as listener:
        await serve(
            config,
            gateway_id=arguments.gateway_id,
            listener=listener,
            secret=secret,
            redis_url=redis_url,
            api_key=credential(API_KEY),
            stop=stop,
        )


def main() -> None:
    """Runs one gateway to its end; a failure is one sentence and exit status 1."""
    arguments = _parser().parse_args()
    try:
        configure(arguments.gateway_id)
        uvloop.run(_run(arguments))
    except BatonError as error:
        print(error.message, file=sys.stderr)
        sys.exit(1)
    logger.info("%s has stopped", arguments.gateway_id)


if __name__ == "__main__":
    main()
