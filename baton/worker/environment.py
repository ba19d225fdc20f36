"""What must be in a worker's environment before its first import.

Libraries read these once, when they are loaded, so a worker cannot set them for
itself: whoever starts the process does.
"""

from __future__ import annotations

from collections.abc import Mapping

WORKER_ENVIRONMENT: Mapping[str, str] = {
    # How long an OpenMP thread spins before it sleeps. With libgomp's default a busy
    # neighbour on the same cores made single steps 10 to 40 times as slow. One stream on
    # two threads without a neighbour: 17 tokens/s at 1,000, 21 at 10,000, 22 at 100,000.
    "GOMP_SPINCOUNT": "10000",
    "GRPC_VERBOSITY": "ERROR",
}


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """These settings; what ``environment`` says of them already stays."""
    return {name: environment.get(name, value) for name, value in WORKER_ENVIRONMENT.items()}
