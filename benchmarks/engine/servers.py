"""The server that is measured: a colocated Baton, and what it takes to run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.server import BatonServer

KV_BYTES = 1024 * 1024 * 1024
"""Of its KV cache."""


@dataclass(frozen=True, slots=True)
class Running:
    name: str
    url: str
    model: str
    start_s: float
    """Until its pools are whole and its gateway answers."""
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
