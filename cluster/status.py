"""`baton status` and `baton stop`: what runs here, and its end."""

from __future__ import annotations

import contextlib
import json
import signal
import time

from rich.console import Console
from rich.table import Table

from baton.errors import BatonError, UnavailableError
from cluster.controller_client import ControllerAddress, PoolRow
from cluster.procfs import is_alive, send
from cluster.server_client import (
    DEFAULT_URL,
    ServerStatus,
    fetch_json,
    parse_status,
    server_url,
)
from cluster.state import RunFolder, state_root


def known_url(cluster: str) -> str:
    """Address of the cluster that is served on this machine, else the default one."""
    state = RunFolder(cluster).running()
    return state.url if state is not None else DEFAULT_URL


def status_table(status: ServerStatus) -> Table:
    """One row per worker; with their ranks, where any has more than one."""
    has_ranks = any(row.num_ranks > 1 for row in status.workers)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pool", no_wrap=True)
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    ranks = ("ranks",) if has_ranks else ()
    for heading in (*ranks, "running", "waiting", "KV used", "KV cached", "KV blocks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in status.workers:
        cached = row.num_cached_blocks / row.num_blocks if row.num_blocks else 0.0
        table.add_row(
            row.role,
            row.worker_id,
            "[green]ready[/green]" if row.ready else "[yellow]not ready[/yellow]",
            *([str(row.num_ranks)] if has_ranks else []),
            str(row.num_running),
            str(row.num_waiting),
            f"{row.used_share:.1%}",
            f"{cached:.1%}",
            f"{row.num_blocks:,}",
        )
    return table


def known_pools(cluster: str, url: str) -> dict[str, PoolRow]:
    """The pools of the server that runs here, if ``url`` is its address; empty where the
    controller cannot be asked."""
    state = RunFolder(cluster).running()
    if state is None or state.url != url:
        return {}
    with contextlib.suppress(BatonError):
        return ControllerAddress(state.controller_url, state.controller_token).pools()
    return {}


def show_status(cluster: str, url: str | None, *, as_json: bool) -> None:
    """Of the server at ``url``, by default the one of ``cluster`` that runs here. Raises
    UnavailableError when no server answers."""
    url = server_url(url or known_url(cluster))
    page = fetch_json(url, "/status")
    if as_json:
        print(json.dumps(page, indent=2))
        return
    status = parse_status(page)
    console = Console(highlight=False)
    models = sorted({worker.model for worker in status.workers})
    state = "not ready" if status.missing else "ready"
    console.print(f"{url}  {', '.join(models)}  [bold]{state}[/bold]\n", soft_wrap=True)
    console.print(status_table(status))
    if pools := known_pools(cluster, url):
        console.print()
    for name, pool in pools.items():
        console.print(f"{name}: {pool}", markup=False, soft_wrap=True)
    for what, sentences in (("missing", status.missing), ("degraded", status.degraded)):
        for sentence in sentences:
            console.print(f"{what}: {sentence}", markup=False, soft_wrap=True)


def stop_server(cluster: str, *, now: bool) -> str:
    """Asks the launcher to stop and waits for its end. Returns what to say.

    With ``now``, what is in flight is not waited for.
    Raises UnavailableError when nothing runs, or when it does not end in time.
    """
    state = RunFolder(cluster).running()
    if state is None:
        raise UnavailableError(
            f"no server of cluster {cluster!r} runs here (looked in {state_root() / cluster})"
        )
    began = time.monotonic()
    send(state.process, signal.SIGTERM)
    if now:
        time.sleep(1.0)  # sooner, it would be taken for the same signal
        send(state.process, signal.SIGTERM)
    while is_alive(state.process):
        if time.monotonic() - began > state.stop_within_s:
            raise UnavailableError(
                f"{state.url} (pid {state.pid}) has not ended within {state.stop_within_s:.0f} s; "
                f"`kill -9 {state.pid}` ends it and all its processes at once"
            )
        time.sleep(0.05)
    return f"stopped {state.url} (pid {state.pid}) in {time.monotonic() - began:.1f} s"
