"""docs/operations.md quotes what `baton serve` says where it ends, word for word."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from baton.config import parse_config
from baton.errors import UnavailableError
from cluster import ray_backend, ray_cluster
from cluster import serve as serve_module
from cluster.lease import Lease, own_name
from cluster.procfs import name_of
from cluster.ray_backend import RayBackend

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


async def _said(launcher: Any) -> str:
    """On standard error, by a server whose cluster is lost."""
    stop = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(UnavailableError) as ended:
        await asyncio.wait_for(serve_module._wait_end(launcher, stop), 10)
    stop.cancel()
    return f"`baton: {ended.value.message}`, exit status 1"


async def test_the_death_of_a_private_ray_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raylet = await asyncio.create_subprocess_exec("sleep", "60")
    monkeypatch.setattr(ray_cluster, "start_local", lambda *_, **__: None)
    monkeypatch.setattr(ray_cluster, "disconnect", lambda: None)
    monkeypatch.setattr(ray_backend, "descendants", lambda _: [name_of(raylet.pid)])
    monkeypatch.setattr(ray_backend, "command_of", lambda _: "raylet")
    backend = RayBackend(parse_config({}), secret="s", redis_url="redis://r", temp_folder=tmp_path)
    await backend.open()
    raylet.kill()
    await raylet.wait()
    said = await _said(backend)
    await backend.close()
    assert said.replace(f"pid {raylet.pid}", "pid N") in PAGE


async def test_the_loss_of_a_given_ray_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "connect", lambda *_, **__: None)
    monkeypatch.setattr(ray_cluster, "disconnect", lambda: None)
    monkeypatch.setattr(ray_cluster, "is_given_up", lambda: True)
    monkeypatch.setattr(RayBackend, "_end_leftovers", lambda *_: asyncio.sleep(0))
    config = parse_config({"cluster": {"ray_address": "ray://h:10001"}})
    backend = RayBackend(config, secret="s", redis_url="redis://r")
    said = await _said(backend)
    await backend.close()
    assert said.replace("ray://h:10001", "ray://…") in PAGE


async def test_the_loss_of_the_lease_is_quoted() -> None:
    class Store:
        async def take_lease(self, _name: str, _ttl_s: float) -> str:
            return own_name()

    store: Any = Store()
    lease = Lease(store, parse_config({}).registry, "mine")

    class Launcher:
        wait_lost = staticmethod(lease.take)

    said = await _said(Launcher())
    said = re.sub(r"pools: .*, pid \d+ \(\w+\)", "HOLDER", said)
    assert said.replace("HOLDER", "pools: HOST, pid N (…)") in PAGE
