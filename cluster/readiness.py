"""Waiting until a starting cluster serves: every gateway is ready and sees every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx

from cluster.console import Progress
from cluster.server_client import ServerStatus, parse_status

_POLL_S = 0.1


async def _status(client: httpx.AsyncClient, url: str) -> ServerStatus | None:
    """None while the gateway does not answer yet."""
    try:
        answer = await client.get(f"{url}/status")
    except httpx.HTTPError:
        return None
    return parse_status(answer.json()) if answer.status_code == 200 else None


async def wait_ready(
    urls: Mapping[str, str], wanted: Callable[[], Mapping[str, int]], progress: Progress
) -> ServerStatus:
    """Returns the first gateway's status once all of them see all workers ready.

    ``urls`` are by gateway id; ``wanted`` says how many workers of each role there
    should be. Says what has become ready on the way. Bound it from outside: it waits
    for ever.
    """
    seen: set[str] = set()
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while True:
            roles = wanted()
            statuses = {name: await _status(client, url) for name, url in urls.items()}
            for name in _ready(statuses):
                if name not in seen:
                    progress.done(f"{name} is ready")
                    seen.add(name)
            if all(_enough(status, roles) for status in statuses.values()):
                first = next(iter(statuses.values()))
                assert first is not None
                return first
            progress.update("waiting for " + _outstanding(statuses, roles))
            await asyncio.sleep(_POLL_S)


def _ready(statuses: Mapping[str, ServerStatus | None]) -> list[str]:
    """Gateways that answer, and workers that one of them sees."""
    answers = {name: status for name, status in statuses.items() if status is not None}
    workers = [w.worker_id for s in answers.values() for w in s.workers if w.ready]
    return [*answers, *workers]


def _enough(status: ServerStatus | None, roles: Mapping[str, int]) -> bool:
    if status is None or status.missing:
        return False
    return all(len(status.ready_workers(role)) >= num for role, num in roles.items())


def _outstanding(statuses: Mapping[str, ServerStatus | None], roles: Mapping[str, int]) -> str:
    parts = [name for name, status in statuses.items() if status is None]
    answers = [status for status in statuses.values() if status is not None]
    for role, num in roles.items():
        here = min((len(status.ready_workers(role)) for status in answers), default=0)
        if here < num:
            parts.append(f"{num - here} of {num} {role} workers")
    return ", ".join(parts) or "the gateway to be ready"
