"""The servers that are compared, each colocated, in one process group, with the same weights."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from baton.errors import UnavailableError
from benchmarks.server import BatonServer

KV_BYTES = 1024 * 1024 * 1024
"""Of each server's KV cache."""
_POLL_S = 0.1
_START_S = 300.0
_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Running:
    name: str
    url: str
    model: str
    start_s: float
    """From its command to its first answer to a request for its models."""
    pid: int

    def pss_bytes(self) -> int:
        """Proportional set sizes of its processes, summed: shared pages are counted once."""
        process = psutil.Process(self.pid)
        total = 0
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
        return total


@contextmanager
def baton(folder: Path) -> Iterator[Running]:
    """One worker that prefills and decodes, and its gateway. Raises UnavailableError."""
    server = BatonServer(
        folder,
        settings={"engine": {"kv_cache_bytes": KV_BYTES, "dtype": "bfloat16"}},
        arguments=("--prefill", "0", "--decode", "1"),
    )
    began = time.monotonic()
    with server:
        start_s = time.monotonic() - began
        yield Running("baton", server.url, server.model(), start_s, server.pid)


@contextmanager
def command(
    name: str, arguments: list[str], folder: Path, *, port: int, environment: Mapping[str, str]
) -> Iterator[Running]:
    """Any other server of OpenAI's API. Raises UnavailableError with the end of its log."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        model = _wait(process, url, log)
        yield Running(name, url, model, time.monotonic() - began, process.pid)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> str:
    ends_at = time.monotonic() + _START_S
    while time.monotonic() < ends_at:
        if process.poll() is not None:
            raise UnavailableError(f"{log.stem} ended:\n{log.read_text(errors='replace')[-2000:]}")
        with suppress(httpx.HTTPError, ValueError, LookupError):
            answer = httpx.get(f"{url}/v1/models", timeout=5, trust_env=False)
            if answer.status_code == 200:
                return str(answer.json()["data"][0]["id"])
        time.sleep(_POLL_S)
    raise UnavailableError(f"{log.stem} is not ready after {_START_S:g} s: {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    if process.poll() is None:
        process.kill()
    process.wait()
