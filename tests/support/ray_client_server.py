"""Ray Client's server, with ports on which the clusters of tests do not meet.

Every client gets a server of its own, on a port from 23000 on: two heads on one machine can
take the same one, and a client then meets the wrong cluster. After ``install()``, heads that
this process starts run this script in the server's place.
"""

from __future__ import annotations

import random
from typing import Any

import ray._private.services as services
from ray.util.client.server import proxier, server

_NUM_PORTS = 100
_start_ray_process = services.start_ray_process


def install() -> None:
    services.start_ray_process = _start


def _start(command: list[str], *arguments: Any, **options: Any) -> Any:
    if "ray.util.client.server" in command:
        at = command.index("-m")
        command = [*command[:at], __file__, *command[at + 2 :]]
    return _start_ray_process(command, *arguments, **options)


if __name__ == "__main__":
    first = random.randrange(24100, 29000, _NUM_PORTS)
    proxier.MIN_SPECIFIC_SERVER_PORT = first
    proxier.MAX_SPECIFIC_SERVER_PORT = first + _NUM_PORTS
    server.main()
