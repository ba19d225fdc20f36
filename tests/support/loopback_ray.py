"""``ray``, for several nodes of a cluster on one machine, on loopback alone.

Run in place of Ray's own command, with the same arguments. Pods have network namespaces;
here they share one, and some things of Ray would go wrong:

- it takes 127.0.0.1 for the host's own address and listens on every interface, and where
  it is told not to (by the variable below) it refuses to start a second node;
- every client's server gets a port from 23000 on, which two clusters on one machine dispute;
- a head that starts again takes the other nodes' processes, which name its address, for a
  head that runs already.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import ray._private.services as services
from ray.scripts.scripts import main
from ray.util.client.server import proxier, server

_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_start_ray_process = services.start_ray_process


def _start(command: list[str], *arguments: Any, **options: Any) -> Any:
    if "ray.util.client.server" in command:
        at = command.index("-m")
        command = [*command[:at], __file__, "client-server", *command[at + 2 :]]
    return _start_ray_process(command, *arguments, **options)


if sys.argv[1] == "client-server":
    del sys.argv[1]
    first = random.randrange(24100, 25000, 50)
    proxier.MIN_SPECIFIC_SERVER_PORT = first
    proxier.MAX_SPECIFIC_SERVER_PORT = first + 50
    server.main()
else:
    os.environ[_LOOPBACK_ONLY] = "0"  # for the processes that are started from here
    services.start_ray_process = _start
    services.get_node_ip_address = lambda address=None: "127.0.0.1"
    services.find_bootstrap_address = lambda temp_dir: None
    sys.argv[0] = "ray"
    main()
