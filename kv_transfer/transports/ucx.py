"""Which networks UCX may use in this process, and the variables that tell it so.

UCX would listen on every interface and take whatever reaches the peer, TCP
included, without a word. A worker's own address says what it is to be reached
on: a loopback address allows the loopback interface alone, any other the
interface that has it, and the RDMA ports. What the user set himself in the
environment stays as it is, and is checked where RDMA is required.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from kv_transfer.transports.base import LinkError

DEVICES = "UCX_NET_DEVICES"
TRANSPORTS = "UCX_TLS"
RDMA_ROOT = Path("/sys/class/infiniband")

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_changing_environment = threading.Lock()


def environment(
    host: str,
    network: Literal["any", "rdma"],
    given: Mapping[str, str],
    *,
    rdma_root: Path = RDMA_ROOT,
) -> dict[str, str]:
    """The variables that UCX must find besides ``given``, for a worker at ``host``.

    Raises LinkError, with what to do about it, where RDMA is required and UCX would have
    none or could use TCP instead, and where no interface has that address.
    """
    ports = rdma_ports(rdma_root)
    if network == "rdma":
        _require_rdma(ports, given, rdma_root)
        wanted = {DEVICES: ",".join(ports), TRANSPORTS: "^tcp"}
    elif DEVICES in given:
        return {}
    elif _address(host).is_loopback:
        wanted = {DEVICES: _interface(host)}
    else:
        wanted = {DEVICES: ",".join([*ports, _interface(host)])}
    return {name: value for name, value in wanted.items() if name not in given}


@contextlib.contextmanager
def applied(variables: Mapping[str, str]) -> Iterator[None]:
    """The process's environment has ``variables`` meanwhile: UCX reads them there alone."""
    with _changing_environment:
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]


def rdma_ports(root: Path = RDMA_ROOT) -> list[str]:
    """Ports of InfiniBand and RoCE adapters that are up, as UCX names them: ``mlx5_0:1``."""
    return [
        f"{state.parents[2].name}:{state.parent.name}"
        for state in sorted(root.glob("*/ports/*/state"))
        if "ACTIVE" in state.read_text()
    ]


def _require_rdma(ports: list[str], given: Mapping[str, str], root: Path) -> None:
    if not ports:
        raise LinkError(
            f"kv_transfer.network is rdma, and {root} lists no port that is up; give this worker "
            "an RDMA adapter (in a container, its device), or set kv_transfer.network to any"
        )
    transports = given.get(TRANSPORTS, "^tcp")
    if _allows_tcp(transports):
        raise LinkError(
            f"kv_transfer.network is rdma, and {TRANSPORTS}={transports} allows TCP; unset it"
        )
    devices = given.get(DEVICES, "all").split(",")
    adapters = [port.split(":")[0] for port in ports]
    if not {"all", *ports, *adapters} & set(devices):
        raise LinkError(
            f"kv_transfer.network is rdma, and {DEVICES}={given[DEVICES]} names none of "
            f"{', '.join(ports)}; unset it, or name one"
        )


def _allows_tcp(transports: str) -> bool:
    names = transports.removeprefix("^").split(",")
    if transports.startswith("^"):
        return "tcp" not in names
    return not {"all", "tcp"}.isdisjoint(names)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise LinkError(f"the worker's address {host} is unknown here: {error}") from error
    return ipaddress.ip_address(str(found).split("%")[0])


def _interface(host: str) -> str:
    """The network interface that has this worker's address."""
    address = _address(host)
    for _, name in socket.if_nameindex():
        if address in _addresses(name) or (address.is_loopback and name == "lo"):
            return name
    raise LinkError(
        f"no network interface has the worker's address {host}; name UCX's interfaces in {DEVICES}"
    )


def _addresses(interface: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Its first IPv4 address and its IPv6 addresses."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        request = struct.pack("256s", interface.encode())
        answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        found.append(ipaddress.IPv4Address(answer[20:24]))  # struct ifreq: name, then sockaddr_in
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, name = line.split()
            if name == interface:
                found.append(ipaddress.IPv6Address(int(number, 16)))
    return found
