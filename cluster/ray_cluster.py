"""Connects this process to Ray: to a cluster that is up, or to one of its own.

A cluster of its own is as small as Ray gets, on loopback alone, with a token of
its own, in a folder of its own, and ends with this process. All functions block
and belong to the Ray thread.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from baton.errors import UnavailableError

_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Ray refuses less than 75 MiB. Nothing of Baton's lies in there."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where this is not "0", Ray listens on the host's own address too.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Under memory pressure Ray would kill workers before the kernel needs to.
    "RAY_memory_monitor_refresh_ms": "0",
}


def _init(ray: Any, **arguments: Any) -> None:
    """Raises UnavailableError for whatever Ray raises."""
    try:
        ray.init(configure_logging=False, log_to_driver=False, **arguments)
    except Exception as error:  # Ray raises many kinds, documented nowhere
        raise UnavailableError(f"Ray could not be reached or started: {error}") from error


def start_local(folder: Path, *, namespace: str, num_workers: int) -> None:
    """Starts Ray on this machine with room for ``num_workers`` actors.

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

    _init(
        ray,
        address="local",
        namespace=namespace,
        num_cpus=num_workers,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _memory=1024 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder / "ray"),
    )


def connect(address: str, *, namespace: str) -> None:
    """Connects to the Ray cluster at ``address``, and ends what a launcher of the
    same cluster name that was killed has left there. Raises: UnavailableError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _init(ray, address=address, namespace=namespace)
    for name in ray.util.list_named_actors():
        try:
            ray.kill(ray.get_actor(name), no_restart=True)
        except ValueError:  # it has ended since
            continue
    for group in ray.util.placement_group_table().values():
        left = group["name"].startswith(f"{namespace}/") and group["state"] != "REMOVED"
        if left:
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def disconnect() -> None:
    """Leaves the cluster; one of our own ends with that."""
    import ray

    ray.shutdown()
