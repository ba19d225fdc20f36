"""A Ray cluster of two nodes on this machine: a head without room, and one that has some.

Run as ``python two_node_ray.py FOLDER PORT CLIENT_PORT`` with Ray's environment set. It
prints ``ready`` and ends, with everything it started, at the end of its standard input.
It listens on loopback alone (``ray start`` of a second node would not).

Every client gets a server of its own, on a port from 23000 on: two heads on one machine
can take the same one, and a client then meets the wrong cluster. So ours begin elsewhere.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import ray._private.services as services
from ray.cluster_utils import Cluster
from ray.util.client.server import proxier, server

_start_ray_process = services.start_ray_process


def _start(command: list[str], *arguments: Any, **options: Any) -> Any:
    if "ray.util.client.server" in command:
        at = command.index("-m")
        command = [*command[:at], __file__, "client-server", *command[at + 2 :]]
    return _start_ray_process(command, *arguments, **options)


NODE = {"object_store_memory": 80_000_000, "memory": 1_000_000_000, "include_log_monitor": False}


def main() -> None:
    if sys.argv[1] == "client-server":
        del sys.argv[1]
        first = random.randrange(24100, 29000, 100)
        proxier.MIN_SPECIFIC_SERVER_PORT = first
        proxier.MAX_SPECIFIC_SERVER_PORT = first + 100
        server.main()
        return
    services.start_ray_process = _start
    folder, port, client_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    (folder / "ray").mkdir()  # RAY_TMPDIR is the folder; the Cluster expects this one
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "gcs_server_port": port,
        "ray_client_server_port": client_port,
    }
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={**NODE, **head})
    try:
        cluster.add_node(**NODE, num_cpus=4, resources={"prefill_node": 4, "spare": 1})
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
