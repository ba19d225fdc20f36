"""Connects this process to Ray: to a cluster that is up, or to one of its own.

A cluster of its own is as small as Ray gets, on loopback alone, with a token of
its own, in a folder of its own, and ends with this process. All functions block
and belong to the Ray thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from baton.errors import UnavailableError

_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray refuses less than 75 MiB. Nothing of Baton's lies in there."""

_REACH_S = 5.0

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where this is not "0", Ray listens on the host's own address too.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Under memory pressure Ray would kill workers before the kernel needs to.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray starts a process per core beforehand, and keeps as many idle as it has CPUs: here
    # far more than there are. Without, two actors were up as soon (2.5 s after the start).
    "RAY_prestart_worker_first_driver": "0",
    "RAY_num_workers_soft_limit": "2",
}


def _init(ray: Any, **arguments: Any) -> None:
    """Raises UnavailableError for whatever Ray raises."""
    try:
        ray.init(configure_logging=False, log_to_driver=False, **arguments)
    except Exception as error:  # Ray raises many kinds, documented nowhere
        raise UnavailableError(f"Ray could not be reached or started: {error}") from error


def start_local(folder: Path, *, namespace: str, resources: Mapping[str, float]) -> None:
    """Starts Ray on this machine; it believes to have ``resources`` (but GPUs: those that
    there are, where any are asked for).

    ``folder`` must be short (Ray puts sockets there) and private to this user.
    Raises: UnavailableError.
    """
    token = folder / "ray-token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(secrets.token_hex(32))
    # Ray reads these while it is imported, and its processes inherit them.
    os.environ.update(_ENVIRONMENT, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    for given in ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(given, None)
    import ray

    further = dict(resources)
    _init(
        ray,
        address="local",
        namespace=namespace,
        num_cpus=math.ceil(further.pop("CPU")),
        num_gpus=None if further.pop("GPU", 0) else 0,
        resources=further,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _memory=1024 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder / "ray"),
    )


def ample(pools: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Room for pools of (what each worker takes, the most workers), also while those that
    leave are still there. GPUs are not made up: a machine has what it has."""
    total: dict[str, float] = {"CPU": 1.0}
    for bundle, most in pools:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + 2 * amount * most
    return total


def by_client(address: str) -> bool:
    """Whether Ray Client is asked for. (A driver does not outlive its connection: Ray ends
    the process.)"""
    return address.startswith("ray://")


def connect(address: str, *, namespace: str) -> None:
    """Connects to the Ray cluster at ``address``: as a driver, on one of its machines
    (``HOST:PORT``), or from anywhere by Ray Client (``ray://HOST:PORT``).

    Where that cluster has token authentication, the environment must say so as Ray wants
    it: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
    Raises: UnavailableError.
    """
    _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        _init(ray, address=address, namespace=namespace)
    except UnavailableError:
        with contextlib.suppress(Exception):
            ray.shutdown()  # of what is half connected, which would refuse the next try
        raise


def _reach(address: str) -> None:
    """Raises UnavailableError where nobody listens; no matter for ``auto``, which names no
    port. Ray Client would take 30 s to say so, and leave a channel behind whose pauses
    (gRPC's, up to 120 s) delay the next try's; a driver would try for minutes."""
    try:
        url = urlsplit(address if by_client(address) else f"//{address}")
        if url.hostname is not None and url.port is not None:
            socket.create_connection((url.hostname, url.port), timeout=_REACH_S).close()
    except (OSError, ValueError) as error:
        raise UnavailableError(f"Ray could not be reached: {error}") from error


def is_given_up() -> bool:
    """Whether Ray Client has given the connection up, after it tried again for a while.
    Does not block, so any thread may ask."""
    from ray.util.client import ray as client

    return not client.is_connected()  # type: ignore[no-untyped-call]


def disconnect() -> None:
    """Leaves the cluster; one of our own ends with that."""
    import ray

    ray.shutdown()
