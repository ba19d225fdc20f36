"""How the Ray backend connects to a given Ray, and tries again: over a stand-in for Ray."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

from baton.config import parse_config
from baton.errors import UnavailableError
from cluster import ray_calls, ray_cluster
from cluster.ray_backend import RayBackend


class Connections:
    """In place of ``ray_cluster.connect``: fails as often as it is told."""

    def __init__(self) -> None:
        self.num_failures = 0
        self.num_tries = 0
        self.num_connected = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def connect(self, address: str, *, namespace: str) -> None:
        self.num_tries += 1
        self.go_on.wait(20)
        if self.num_tries <= self.num_failures:
            raise UnavailableError(f"Ray could not be reached: {address}")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connections]:
    connections = Connections()
    monkeypatch.setattr(ray_cluster, "connect", connections.connect)
    monkeypatch.setattr(ray_cluster, "disconnect", lambda: None)
    monkeypatch.setattr(ray_calls, "find", lambda namespace: [])
    monkeypatch.setattr(ray_calls, "forget_all_but", lambda namespace, names: None)
    yield connections
    connections.go_on.set()


def backend_of(connections: Connections, *, keep: bool = True) -> RayBackend:
    def connected() -> None:
        connections.num_connected += 1

    config = parse_config({"cluster": {"ray_address": "ray://head:10001"}})
    return RayBackend(
        config, secret="s", redis_url="redis://none", keep=keep, on_connected=connected
    )


async def test_opening_that_failed_is_tried_anew_and_one_that_did_not_is_not(
    connections: Connections,
) -> None:
    connections.num_failures = 1
    backend = backend_of(connections)
    both = await asyncio.gather(backend.open(), backend.open(), return_exceptions=True)
    assert [type(error) for error in both] == [UnavailableError] * 2
    assert connections.num_tries == 1, "who asks meanwhile shares one try"
    await backend.open()
    await backend.open()
    assert (connections.num_tries, connections.num_connected) == (2, 1)
    assert await backend.close()


async def test_backend_that_keeps_workers_does_not_wait_for_a_connecting_that_hangs(
    connections: Connections,
) -> None:
    connections.go_on.clear()
    backend = backend_of(connections)
    opening = asyncio.create_task(backend.open())
    await asyncio.sleep(0)
    opening.cancel()
    assert await asyncio.wait_for(backend.close(), 10) is False
    connections.go_on.set()


async def test_backend_that_keeps_none_waits_for_its_opening(connections: Connections) -> None:
    connections.go_on.clear()
    backend = backend_of(connections, keep=False)
    opening = asyncio.create_task(backend.open())
    await asyncio.sleep(0)
    closing = asyncio.create_task(backend.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    connections.go_on.set()
    assert await closing
    await opening


@pytest.mark.parametrize("scheme", ["ray://", ""])
def test_what_a_failed_connecting_leaves_is_shut_down(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    called: list[str] = []

    def init(**_: Any) -> None:
        called.append("init")
        raise ConnectionError("ray client connection timeout")

    def shutdown() -> None:
        called.append("shutdown")
        raise RuntimeError("nothing is connected")

    ray = types.ModuleType("ray")
    ray.init, ray.shutdown = init, shutdown  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"{scheme}127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="ray client connection timeout"):
            ray_cluster.connect(address, namespace="n")
    assert called == ["init", "shutdown"]
    with pytest.raises(UnavailableError, match=r"could not be reached: .*refused"):
        ray_cluster.connect(address, namespace="n")
    with pytest.raises(UnavailableError, match="could not be reached: Port could not"):
        ray_cluster.connect(f"{scheme}head:port", namespace="n")
    assert called == ["init", "shutdown"], "Ray's own way to find that out takes 30 s"
