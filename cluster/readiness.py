"""Waiting until a starting cluster serves: the gateway is ready and sees every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx

from cluster.console import Progress
from cluster.server_client import ServerStatus, parse_status

_POLL_S = 0.1


async def _status(client: httpx.AsyncClient) -> ServerStatus | None:
    """None while the gateway does not answer yet."""
    try:
        answer = await client.get("/status")
    except httpx.HTTPError:
        return None
    return parse_status(answer.json()) if answer.status_code == 200 else None


async def wait_ready(url: str, pools: Mapping[str, int], progress: Progress) -> ServerStatus:
    """Returns the first status with all of ``pools`` (workers per role) ready.

    Says what has become ready on the way. Bound it from outside: it waits for ever.
    """
    seen: set[str] = set()
    async with httpx.AsyncClient(base_url=url, timeout=2.0, trust_env=False) as client:
        while True:
            status = await _status(client)
            if status is not None:
                ready = [worker.worker_id for worker in status.workers if worker.ready]
                for name in ["gateway-0", *ready]:
                    if name not in seen:
                        progress.done(f"{name} is ready")
                        seen.add(name)
                enough = all(len(status.ready_workers(role)) >= n for role, n in pools.items())
                if enough and not status.missing:
                    return status
            progress.update("waiting for " + _outstanding(status, pools))
            await asyncio.sleep(_POLL_S)


def _outstanding(status: ServerStatus | None, pools: Mapping[str, int]) -> str:
    here = {role: len(status.ready_workers(role)) if status else 0 for role in pools}
    parts = [] if status is not None else ["the gateway"]
    for role, wanted in pools.items():
        if here[role] < wanted:
            parts.append(f"{wanted - here[role]} of {wanted} {role} workers")
    return ", ".join(parts) or "the gateway to be ready"
