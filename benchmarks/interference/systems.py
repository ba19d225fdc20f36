"""The systems that are compared, each with the same two cores, and where their processes run.

Everything that is measured, the client included, runs on these two cores, however many the
machine has. Where Baton's prefill and decode have a core each, whoever else there is shares the
core of prefill: it has the slack, and a token waits for nobody but its own step. vLLM's prefill has
none at this load, so that its proxy and the client would starve there: they run on both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.errors import ConfigurationError
from benchmarks.engine.servers import KV_BYTES, Running
from benchmarks.interference.pinning import pin_tree
from benchmarks.peers import vllm
from benchmarks.server import BatonServer

DISAGGREGATED, COLOCATED = "baton disaggregated", "baton colocated"
VLLM_DISAGGREGATED, VLLM, VLLM_SMALL = "vllm disaggregated", "vllm", "vllm, small steps"


@dataclass(frozen=True, slots=True)
class System:
    name: str
    engine: Literal["baton", "vllm"]
    is_disaggregated: bool
    max_num_batched_tokens: int | None = None
    """In one step; None: the engine's own default."""

    @property
    def label(self) -> str:
        """How to start it."""
        chunk = self.max_num_batched_tokens
        if self.engine == "baton":
            pools = "--prefill 1 --decode 1" if self.is_disaggregated else "--prefill 0 --decode 1"
            with_chunk = f" with `engine.max_num_batched_tokens: {chunk}`" if chunk else ""
            return f"`baton serve {pools}`{with_chunk}"
        if self.is_disaggregated:
            return "two of `vllm serve` with its NixlConnector, and a proxy of ours"
        return f"`vllm serve{f' --max-num-batched-tokens {chunk}' if chunk else ''}`"

    @property
    def placed(self) -> tuple[str, str]:
        """What runs on the first core, and on the second."""
        if not self.is_disaggregated:
            server = "gateway and worker" if self.engine == "baton" else "server"
            everything = f"client, {server}: 2 threads, on both"
            return everything, everything
        if self.engine == "baton":
            return "prefill worker (1 thread), gateway, controller, Redis, client", "decode worker"
        others = "proxy and client, on both"
        return f"prefill instance (1 thread); {others}", f"decode instance (1 thread); {others}"

    def client_cores(self, cores: Sequence[int]) -> set[int]:
        is_beside_prefill = self.is_disaggregated and self.engine == "baton"
        return {cores[0]} if is_beside_prefill else set(cores)


@dataclass(frozen=True, slots=True)
class Serving:
    """A system that answers."""

    running: Running
    """Whom to ask."""
    parts: Sequence[Running]
    """All of it."""
    start_s: float

    def pss_mb(self) -> float:
        """Of all its processes; what they share is counted once."""
        return sum(part.pss_bytes() for part in self.parts) / 1e6


def two_cores() -> tuple[int, int]:
    """Raises ConfigurationError where this process may use only one."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigurationError("prefill and decode are pinned to a core each: two are needed")
    return cores[0], cores[1]


@contextmanager
def serving(system: System, folder: Path, cores: tuple[int, int]) -> Iterator[Serving]:
    """Starts it, and pins what is to be pinned, before any load.

    Raises UnavailableError, and ConfigurationError for a peer that is not set up.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        if system.engine == "baton":
            parts = [stack.enter_context(_baton(system, folder, cores))]
        elif system.is_disaggregated:
            parts = list(stack.enter_context(vllm.disaggregated(folder, cores=cores)))
        else:
            wanted = vllm.Instance("vllm", set(cores), system.max_num_batched_tokens)
            parts = [stack.enter_context(vllm.instance(wanted, folder))]
        yield Serving(parts[0], parts, time.monotonic() - began)


@contextmanager
def _baton(system: System, folder: Path, cores: tuple[int, int]) -> Iterator[Running]:
    engine: dict[str, object] = {"kv_cache_bytes": KV_BYTES, "dtype": "bfloat16"}
    if system.max_num_batched_tokens is not None:
        engine["max_num_batched_tokens"] = system.max_num_batched_tokens
    num_prefill = "1" if system.is_disaggregated else "0"
    server = BatonServer(
        folder,
        settings={"engine": engine},
        arguments=("--prefill", num_prefill, "--decode", "1"),
    )
    began = time.monotonic()
    with server:
        if system.is_disaggregated:
            first, second = cores
            pin_tree(server.pid, {first}, {"prefill-0": {first}, "decode-0": {second}})
        yield Running(system.name, server.url, server.model(), time.monotonic() - began, server.pid)
