"""A Ray cluster of two nodes on this machine: a head without room, and one that has some.

Run as ``python two_node_ray.py FOLDER PORT CLIENT_PORT`` with Ray's environment set. It
prints ``ready`` and ends, with everything it started, at the end of its standard input.
It listens on loopback alone (``ray start`` of a second node would not).
"""

from __future__ import annotations

import sys
from pathlib import Path

import ray_client_server
from ray.cluster_utils import Cluster

NODE = {"object_store_memory": 80_000_000, "memory": 1_000_000_000, "include_log_monitor": False}


def main() -> None:
    ray_client_server.install()
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
