"""What can be known to fail before anything is started, said in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from baton.config import BatonConfig, ControllerConfig
from baton.errors import ConfigurationError
from baton.parallelism import check_parallelism
from cluster.sizes import configured_sizes, gpu_conflict


def check_platform() -> None:
    """Raises ConfigurationError where Baton cannot run at all."""
    if sys.platform != "linux":
        raise ConfigurationError(f"Baton runs on Linux; this is {sys.platform}")


def check_port(host: str, port: int) -> None:
    """Raises ConfigurationError unless ``host:port`` can be listened on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigurationError(_port_sentence(host, port, error), param="port") from None


def gateway_ports(config: BatonConfig) -> tuple[int, ...]:
    """One for each gateway, all free now: the configured one and those after it, or any
    where that is 0. Raises ConfigurationError."""
    gateway = config.gateway
    if gateway.port == 0:
        return _any_ports(gateway.host, gateway.replicas)
    last = gateway.port + gateway.replicas - 1
    if last > 65535:
        raise ConfigurationError(
            f"{gateway.replicas} gateways from port {gateway.port} on would need port {last}; "
            "choose a lower one with --port",
            param="port",
        )
    ports = tuple(range(gateway.port, last + 1))
    for port in ports:
        check_port(gateway.host, port)
    return ports


def _any_ports(host: str, num: int) -> tuple[int, ...]:
    """Different ones: all are held until the last is found."""
    check_port(host, 0)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket(family)) for _ in range(num)]
        for probe in probes:
            probe.bind((host, 0))
        return tuple(probe.getsockname()[1] for probe in probes)


def listen_for_controller(config: ControllerConfig) -> socket.socket:
    """The controller's listening socket. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigurationError(
            f"the controller cannot listen on {config.host} port {config.port}: "
            f"{error.strerror or error}; choose others with controller.host and controller.port",
            param="controller.port",
        ) from None


def check_pools(config: BatonConfig) -> None:
    """Raises ConfigurationError for a pool whose workers would be taken for gateways."""
    if "gateway" in config.pools:
        raise ConfigurationError(
            "pools.gateway: its workers would be named like gateways; choose another name"
        )


def check_gpus(config: BatonConfig) -> None:
    """Raises ConfigurationError for workers that would take each other's GPU."""
    if (conflict := gpu_conflict(config, configured_sizes(config))) is not None:
        raise ConfigurationError(conflict, param="engine.device")


def _port_sentence(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} on {host} is in use; end what uses it (`baton stop`, if it is Baton) "
            "or choose another with --port"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges; choose one of 1024 or more with --port"
    return f"cannot listen on {host}: {error.strerror or error}; choose an address with --host"


def check_backend(config: BatonConfig, find: Callable[[str], object | None]) -> None:
    """Raises ConfigurationError when the backend's package is missing.

    ``find`` is ``importlib.util.find_spec``: Ray is not imported for this.
    """
    if config.cluster.backend == "ray" and find("ray") is None:
        raise ConfigurationError(
            "the package ray is not installed; install it (pip install 'baton[ray]') "
            "or use --backend processes"
        )
    if config.cluster.backend == "processes" and config.cluster.ray_address is not None:
        raise ConfigurationError("--ray-address is for --backend ray; leave one of them out")


def local_model(config: BatonConfig) -> str:
    """The model as every process understands it, wherever it runs: a name, or an
    absolute path. Raises CheckpointError when it cannot be opened, ConfigurationError
    for a pool whose ranks it cannot be split over."""
    from baton.checkpoint.checkpoint import open_checkpoint
    from baton.checkpoint.resolve import known_names

    model = config.model
    checkpoint = open_checkpoint(model, config.engine.load_format)
    for name, pool in config.pools.items():
        check_parallelism(checkpoint.config, pool.parallelism, where=f"pools.{name}")
    return model if model in known_names() else str(Path(model).expanduser().absolute())


def default_threads(config: BatonConfig) -> int:
    """Compute threads of each rank of a worker where ``engine.threads`` is 0: this
    process's cores, shared out evenly.

    Measured with one prefill and one decode worker on two cores: a thread each gave
    37 tokens/s to one stream and an ITL of 47 ms at p99 while long prompts came in;
    two threads each gave 25 tokens/s and 180 ms.
    """
    num_ranks = sum(pool.replicas * pool.parallelism.num_ranks for pool in config.pools.values())
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)
