"""A whole Baton for a benchmark: ``baton serve`` in a process of its own, from ready to gone.

    with BatonServer(folder, arguments=("--prefill", "1", "--decode", "1")) as server:
        httpx.get(server.url + "/v1/models")

The kernel kills it when the benchmark dies, and with it everything that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from baton.config import BatonConfig, load_config
from baton.errors import ConfigurationError, UnavailableError
from baton.records import Role
from cluster import bound_child
from cluster.redis_server import free_port
from cluster.server_client import ServerStatus, fetch_json, parse_status

_START_S = 180.0
"""Longer than the launcher's own ``cluster.start_timeout_s``, which says why it failed."""
_STOP_S = 60.0
_POLL_S = 0.1
_ROLES: tuple[Role, ...] = ("prefill", "decode")


class BatonServer:
    """One ``baton serve``. Everything it writes is under ``folder``, which must be its own.

    ``settings`` is the configuration file's content; ``arguments`` are those of
    ``baton serve``; ``environment`` is added to this process's own.
    """

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
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log_file = folder / "serve.log"
        file = folder / "baton.yaml"
        file.write_text(yaml.safe_dump(dict(settings or {})))
        self._state = folder / "state"
        self._command = [
            *(sys.executable, "-I", "-S", bound_child.__file__, str(os.getpid())),
            *(sys.executable, "-m", "cluster.cli", "serve"),
            *("--port", str(port), "--backend", backend, "--config", str(file)),
            *arguments,
        ]
        own = {"BATON_STATE_DIR": str(self._state), **(environment or {})}
        self._environment = {**os.environ, **own}
        self._environment.pop("REDIS_URL", None)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    # ---------------------------------------------------------------- start and stop

    def start(self) -> Self:
        """Returns once every worker of every pool is ready. Raises UnavailableError."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_ready(time.monotonic() + _START_S)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """As Ctrl-C does it; kills what does not end within a minute."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel ends its children with it
            process.wait()

    def _wait_ready(self, ends_at: float) -> None:
        assert self._process is not None
        while not self._ready():
            if self._process.poll() is not None:
                raise UnavailableError(f"baton serve ended:\n{self.log_file.read_text()}")
            if time.monotonic() >= ends_at:
                raise UnavailableError(f"baton serve is not ready; see {self.log_file}")
            time.sleep(_POLL_S)

    def _ready(self) -> bool:
        config = self._config()
        if config is None:
            return False
        try:
            status = self.status()
        except UnavailableError:
            return False
        enough = (len(status.ready_workers(r)) >= config.num_replicas(r) for r in _ROLES)
        return not status.missing and all(enough)

    def _config(self) -> BatonConfig | None:
        """What the launcher serves with; None until it has written that down."""
        found = next(self._state.glob("*/config.yaml"), None)
        try:
            return load_config(found) if found else None
        except ConfigurationError:  # half written
            return None

    # ---------------------------------------------------------------- asking

    @property
    def pid(self) -> int:
        """Of the launcher."""
        assert self._process is not None, "not started"
        return self._process.pid

    def status(self) -> ServerStatus:
        """``GET /status``. Raises UnavailableError."""
        return parse_status(fetch_json(self.url, "/status"))

    def model(self) -> str:
        """The id that requests name. Raises UnavailableError."""
        name: str = fetch_json(self.url, "/v1/models")["data"][0]["id"]
        return name

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of ``name`` on the gateway's page whose labels include
        ``labels``. Raises httpx.HTTPError."""
        page = httpx.get(self.url + "/metrics", timeout=10.0, trust_env=False).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
