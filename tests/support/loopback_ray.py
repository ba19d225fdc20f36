"""``ray``, for several nodes of a cluster on one machine, on loopback alone.

Run in place of Ray's own command, with the same arguments. Pods have network namespaces;
here they share one, and some things of Ray would go wrong:

- it takes 127.0.0.1 for the host's own address and listens on every interface, and where
  it is told not to (by the variable below) it refuses to start a second node;
- two heads dispute the ports of Ray Client (``ray_client_server.py``);
- a head that starts again takes the other nodes' processes, which name its address, for a
  head that runs already.
"""

from __future__ import annotations

import os
import sys

import ray._private.services as services
import ray_client_server
from ray.scripts.scripts import main

# For the processes that are started from here.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
ray_client_server.install()
services.get_node_ip_address = lambda address=None: "127.0.0.1"
services.find_bootstrap_address = lambda temp_dir: None
sys.argv[0] = "ray"
main()
