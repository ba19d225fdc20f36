"""How long a stop may take: what is written for `baton stop` covers every bound of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from support.fake_pools import FakeBackend

from baton.config import parse_config
from cluster.console import Progress
from cluster.launcher import Doors, Launcher, stop_within_s
from cluster.reconciler import PROOF_S
from cluster.state import RunFolder, make_temp_folder


class Bounds:
    """Stands in for all that a launcher stops: adds up what each may take at most."""

    def __init__(self) -> None:
        self.total_s = 0.0

    async def stop(self, _: Sequence[str], *, limit_s: float, hurry: asyncio.Event) -> int:
        self.total_s += limit_s + PROOF_S
        return 0

    async def stop_workers(self, *, limit_s: float, hurry: asyncio.Event) -> int:
        return await self.stop([], limit_s=limit_s, hurry=hurry)

    async def close_api(self) -> None:
        """While the gateways drain."""

    async def close(self) -> None:
        """Of Redis one answer."""


async def test_stop_is_given_the_time_of_everything_that_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_STATE_DIR", str(tmp_path))
    cluster = {"backend": "processes", "stop_timeout_s": 100}
    config = parse_config({"gateway": {"drain_s": 70}, "cluster": cluster})
    with socket() as listener:
        launcher = Launcher(
            config,
            folder=RunFolder("default"),
            temp_folder=make_temp_folder(),
            doors=Doors((8000,), listener, "token"),
            redis_url="redis://127.0.0.1:1",
            progress=Progress(),
        )
        bounds: Any = Bounds()
        launcher._reconciler = launcher._controller = bounds
        backend: Any = FakeBackend()
        closing: list[float] = []

        async def wait(_: Any, *, timeout: float, return_when: str) -> None:
            closing.append(timeout)

        launcher._pools, launcher._serving = backend, True
        monkeypatch.setattr("cluster.launcher.asyncio.wait", wait)
        await launcher.stop(asyncio.Event())
    assert closing == [100]
    assert stop_within_s(config) > bounds.total_s + closing[0]
