"""Where a worker listens, and where it tells others to find it.

In a pod these differ: it listens on every interface, and others reach it at the
pod's address, which ``BATON_ADVERTISE_HOST`` gives.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from baton.errors import ConfigurationError

ADVERTISE_HOST = "BATON_ADVERTISE_HOST"


def advertised_host(host: str, environment: Mapping[str, str]) -> str:
    """The host that others reach this worker at, when it listens on ``host``.

    Raises ConfigurationError where that would be every interface: nobody can connect to it.
    """
    advertised = environment.get(ADVERTISE_HOST, "").strip()
    named = advertised or host
    if _is_wildcard(named):
        raise ConfigurationError(
            f"{ADVERTISE_HOST if advertised else 'worker.host'} is {named}, which is no address "
            f"that others can reach: set {ADVERTISE_HOST} to this machine's (in a pod: its IP)"
        )
    return named


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False  # a name


def joined(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
