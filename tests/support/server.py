"""A whole Baton as its user starts it, with faults to inject, pids to kill and pages to read."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks import server
from benchmarks.metrics_page import MetricsPage
from cluster.procfs import descendants
from cluster.redis_server import free_port


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, what: str, poll_s: float = 0.05
) -> None:
    """Polls ``condition``; AssertionError naming ``what`` when it does not come true."""
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, f"not within {timeout_s:g} s: {what}"
        time.sleep(poll_s)


def _free_pair() -> int:
    """A port that nobody listens on, the next one neither: a second gateway takes it."""
    for _ in range(100):
        port = free_port()
        with socket.socket() as probe, contextlib.suppress(OSError, OverflowError):
            probe.bind(("127.0.0.1", port + 1))
            return port
    raise AssertionError("no two free ports side by side")


class Page(MetricsPage):
    """A gateway's page, and what it says of the pools."""

    def blocks(self) -> dict[tuple[str, str], float]:
        """(role, state) → blocks."""
        return {
            (role, state): self.metric("baton_kv_blocks", role=role, state=state)
            for role in ("prefill", "decode")
            for state in ("free", "cached", "referenced", "quarantined")
        }

    def at_rest(self) -> bool:
        """Every block is free or cached, no request is in flight, no sequence is anywhere."""
        held = sum(
            self.metric("baton_kv_blocks", state=state) for state in ("referenced", "quarantined")
        )
        work = sum(
            self.metric(name)
            for name in (
                "baton_requests_in_flight",
                "baton_choices_queued",
                "baton_sequences_running",
                "baton_sequences_waiting",
            )
        )
        return held == 0 and work == 0


class BatonServer(server.BatonServer):
    """One running ``baton serve`` for tests."""

    START_S = 110.0
    STOP_S = 40.0

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        backend: str = "processes",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.faults_file = folder / "faults.json"
        super().__init__(
            folder,
            settings=settings,
            arguments=arguments,
            backend=backend,
            environment={"BATON_FAULTS_FILE": str(self.faults_file), **(environment or {})},
            port=_free_pair(),
        )
        self.rest_s = 0.0
        """How long the last ``wait_at_rest`` waited until rest began."""

    def descendants(self) -> list[int]:
        """Processes that descend from the launcher."""
        return [process.pid for process in descendants(self.pid)]

    def worker_pid(self, worker_id: str) -> int:
        """Of the process that writes the worker's log: whichever backend has started it."""
        log = self.folder / "state" / "default" / "logs" / f"{worker_id}.log"
        for pid in self.descendants():
            try:
                writes_to = Path(f"/proc/{pid}/fd/1").readlink()
            except OSError:
                continue
            if writes_to == log:
                return pid
        raise AssertionError(f"no process is {worker_id}")

    def client(self, **options: Any) -> httpx.Client:
        timeout = options.pop("timeout", 120.0)
        # Nothing here speaks https: to load its certificates takes 20 ms of CPU.
        return httpx.Client(base_url=self.url, timeout=timeout, verify=False, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions, greedy unless told otherwise; raises on an error status."""
        defaults = {"model": self.model(), "temperature": 0, "return_token_ids": True}
        with self.client() as client:
            response = client.post("/v1/completions", json={**defaults, **body})
            assert response.status_code == 200, response.text
            result: dict[str, Any] = response.json()
            return result

    def page(self) -> Page:
        return Page(self.metrics_text())

    def wait_at_rest(self, *, timeout_s: float = 15.0, still_s: float = 0.7) -> Page:
        """Until no block is referenced or quarantined and nothing is in flight.

        Workers report what was true after their last step, so it has to stay true
        for longer than a step and a report take.
        """
        since: float | None = None
        began = time.monotonic()
        ends_at = began + timeout_s
        while True:
            page = self.page()
            now = time.monotonic()
            if not page.at_rest():
                assert now < ends_at, f"not at rest: {page.blocks()}"
                since = None
            elif since is None:
                since = now
            elif now - since >= still_s:
                self.rest_s = since - began
                return page
            time.sleep(0.05)

    def inject(self, **points: Mapping[str, Any]) -> None:
        """Sets the fault points (dots written as double underscores); none clears them."""
        plan = {name.replace("__", "."): dict(action) for name, action in points.items()}
        scratch = self.faults_file.with_suffix(".new")
        scratch.write_text(json.dumps(plan))
        scratch.replace(self.faults_file)
