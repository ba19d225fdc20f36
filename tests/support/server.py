"""A whole Baton as its user starts it: ``baton serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.redis_server import free_port

START_S = 110.0
STOP_S = 40.0


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


class Page:
    """A metrics page, parsed."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of ``name`` whose labels include ``labels``."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

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


class BatonServer:
    """One running ``baton serve``; ``settings`` is the configuration file's content."""

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        backend: str = "processes",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = _free_pair()
        self.url = f"http://127.0.0.1:{self.port}"
        self.faults_file = folder / "faults.json"
        configuration = folder / "baton.yaml"
        configuration.write_text(yaml.safe_dump(dict(settings or {})))
        self._log_path = folder / "serve.log"
        self._command = [
            *(sys.executable, "-m", "cluster.cli", "serve"),
            *("--port", str(self.port), "--backend", backend, "--config", str(configuration)),
            *arguments,
        ]
        self.environment = {
            **os.environ,
            "BATON_STATE_DIR": str(folder / "state"),
            "BATON_FAULTS_FILE": str(self.faults_file),
            **(environment or {}),
        }
        self.environment.pop("REDIS_URL", None)
        self._process: subprocess.Popen[bytes] | None = None
        self.rest_s = 0.0
        """How long the last ``wait_at_rest`` waited until rest began."""

    def start(self) -> BatonServer:
        """Returns once every pool is whole; AssertionError with the log otherwise."""
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ends_at = time.monotonic() + START_S
        while "curl" not in self.log:
            assert self._process.poll() is None, f"baton serve ended:\n{self.log}"
            assert time.monotonic() < ends_at, f"baton serve is not ready:\n{self.log}"
            time.sleep(0.05)
        return self

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def descendants(self) -> list[int]:
        """Processes that descend from the launcher, found through /proc."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                parents[int(entry.name)] = int(fields[1])
        found: list[int] = []
        frontier = [self.pid]
        while frontier:
            frontier = [pid for pid, parent in parents.items() if parent in frontier]
            found += frontier
        return found

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

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals the launcher and waits for it; returns its exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            return self._process.wait(STOP_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process = None

    # ------------------------------------------------------------------ asking

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=options.pop("timeout", 120.0), **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        """POST /v1/completions, greedy unless told otherwise; raises on an error status."""
        defaults = {"model": self.model(), "temperature": 0, "return_token_ids": True}
        with self.client() as client:
            response = client.post("/v1/completions", json={**defaults, **body})
            assert response.status_code == 200, response.text
            result: dict[str, Any] = response.json()
            return result

    def model(self) -> str:
        with self.client() as client:
            name: str = client.get("/v1/models").json()["data"][0]["id"]
            return name

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            result: dict[str, Any] = client.get("/status").json()
            return result

    def page(self) -> Page:
        """The gateway's metrics page, read once."""
        with self.client() as client:
            return Page(client.get("/metrics").text)

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of ``name`` whose labels include ``labels``."""
        return self.page().metric(name, **labels)

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
