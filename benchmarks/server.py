"""A whole Baton as its user starts it: ``baton serve`` in a process of its own.

    with BatonServer(folder, arguments=("--prefill", "1", "--decode", "1")) as server:
        httpx.get(server.url + "/v1/models")

The kernel kills it when the process that started it dies, and with it everything that it
started itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from baton.errors import UnavailableError
from benchmarks.metrics_page import MetricsPage
from cluster import bound_child
from cluster.redis_server import free_port
from cluster.server_client import fetch_json, get

_POLL_S = 0.05
_ANSWER_S = 30.0
"""A gateway whose machine is busy is slow to tell."""
_LAST_WORDS = "curl"
"""The launcher announces a line to try once every pool is whole and every gateway answers."""


class BatonServer:
    """One ``baton serve``. Everything it writes is under ``folder``, which must be its own.

    ``settings`` is the configuration file's content; ``arguments`` are those of
    ``baton serve``; ``environment`` is added to this process's own.
    """

    START_S: ClassVar[float] = 180.0
    """Longer than the launcher's own ``cluster.start_timeout_s``, which says why it failed."""
    STOP_S: ClassVar[float] = 60.0

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any] | None = None,
        arguments: tuple[str, ...] = (),
        backend: str = "processes",
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / "serve.log"
        file = folder / "baton.yaml"
        file.write_text(yaml.safe_dump(dict(settings or {})))
        self._command = [
            *(sys.executable, "-I", "-S", bound_child.__file__, str(os.getpid())),
            *(sys.executable, "-m", "cluster.cli", "serve"),
            *("--port", str(self.port), "--backend", backend, "--config", str(file)),
            *arguments,
        ]
        own = {"BATON_STATE_DIR": str(folder / "state"), **(environment or {})}
        self.environment = {**os.environ, **own}
        self.environment.pop("REDIS_URL", None)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    # ---------------------------------------------------------------- start and stop

    def start(self) -> Self:
        """Returns once every pool is whole. Raises UnavailableError, with the log."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_announced(self._process, time.monotonic() + self.START_S)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_announced(self, process: subprocess.Popen[bytes], ends_at: float) -> None:
        while _LAST_WORDS not in self.log:
            if process.poll() is not None:
                raise UnavailableError(f"baton serve ended:\n{self.log}")
            if time.monotonic() >= ends_at:
                raise UnavailableError(f"baton serve is not ready:\n{self.log}")
            time.sleep(_POLL_S)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals the launcher, by default as ``baton stop`` does, and returns its exit
        status; what does not end in time is killed, with a status below 0."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(self.STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()  # the kernel ends its children with it
            return process.wait()

    @property
    def pid(self) -> int:
        """Of the launcher."""
        assert self._process is not None, "not started"
        return self._process.pid

    # ---------------------------------------------------------------- asking

    @property
    def log(self) -> str:
        """What the launcher has said so far."""
        return self.log_file.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        """``GET /status``. Raises UnavailableError."""
        result: dict[str, Any] = fetch_json(self.url, "/status", timeout_s=_ANSWER_S)
        return result

    def model(self) -> str:
        """The id that requests name. Raises UnavailableError."""
        name: str = fetch_json(self.url, "/v1/models", timeout_s=_ANSWER_S)["data"][0]["id"]
        return name

    def page(self) -> MetricsPage:
        """The gateway's metrics page, read once. Raises httpx.HTTPError."""
        return MetricsPage(self.metrics_text())

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of ``name`` whose labels include ``labels``, read anew."""
        return self.page().metric(name, **labels)

    def metrics_text(self) -> str:
        """Raises httpx.HTTPError."""
        return get(self.url + "/metrics", timeout_s=_ANSWER_S).text
