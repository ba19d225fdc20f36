"""The servers that are measured, and what they take to run: a colocated Baton, and its peers,
which ``benchmarks/peers/setup.sh`` sets up. All have the same weights and as much memory for KV;
llama.cpp has those of the 4-bit file, from which the others' bfloat16 ones are made.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.errors import ConfigurationError, UnavailableError
from benchmarks.server import BatonServer
from cluster import bound_child
from cluster.redis_server import free_port
from cluster.server_client import fetch_json, get
from engine.weights.load import hf_folder

KV_BYTES = 1024 * 1024 * 1024
"""Of its KV cache."""
_STREAMS = 32
"""That a server takes at once."""
_PEERS = Path(__file__).resolve().parents[2] / ".peers"
_START_S = 300.0
_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Running:
    name: str
    url: str
    model: str
    start_s: float
    """Until it can answer."""
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
def baton(folder: Path, *, quantization: str = "none") -> Iterator[Running]:
    """One worker that prefills and decodes, and its gateway. Raises UnavailableError."""
    engine = {"kv_cache_bytes": KV_BYTES, "dtype": "bfloat16", "quantization": quantization}
    server = BatonServer(
        folder, settings={"engine": engine}, arguments=("--prefill", "0", "--decode", "1")
    )
    began = time.monotonic()
    with server:
        name = "baton" if quantization == "none" else f"baton {quantization}"
        yield Running(name, server.url, server.model(), time.monotonic() - began, server.pid)


@contextmanager
def vllm(folder: Path) -> Iterator[Running]:
    """vLLM's build for CPUs, on both of this process's cores. Raises UnavailableError."""
    model = hf_folder(open_checkpoint(DEFAULT_MODEL), torch.bfloat16)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    port = free_port()
    command = [
        *(_program("vllm", "bin/vllm"), "serve", str(model), "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(2 * _STREAMS)),
    ]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,  # by default it takes one core
        "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30),
        "HF_HUB_OFFLINE": "1",
    }
    with _peer("vllm", command, environment, port=port, folder=folder) as running:
        yield running


@contextmanager
def llamacpp(folder: Path) -> Iterator[Running]:
    """llama.cpp's server, with a slot for each stream. Raises UnavailableError."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    layout = checkpoint.config.kv_layout(num_blocks=1, block_size=1, dtype="bfloat16")
    threads, port = str(len(os.sched_getaffinity(0))), free_port()
    command = [
        *(
            _program("llamacpp", "**/bin/llama-server"),
            "--model",
            str(checkpoint.weights_source),
            "--no-webui",
        ),
        *("--host", "127.0.0.1", "--port", str(port), "--threads", threads),
        *("--parallel", str(_STREAMS), "--ctx-size", str(KV_BYTES // layout.block_bytes)),
    ]
    with _peer("llamacpp", command, {}, port=port, folder=folder) as running:
        yield running


PEERS: Mapping[str, Callable[[Path], AbstractContextManager[Running]]] = {
    "vllm": vllm,
    "llamacpp": llamacpp,
}


def _program(peer: str, pattern: str) -> str:
    """Raises ConfigurationError where the peer is not set up."""
    found = sorted((_PEERS / peer).glob(pattern))
    if not found:
        raise ConfigurationError(
            f"{peer} is not set up: run `bash benchmarks/peers/setup.sh {peer}`"
        )
    return str(found[0])


@contextmanager
def _peer(
    name: str, command: list[str], environment: Mapping[str, str], *, port: int, folder: Path
) -> Iterator[Running]:
    """Runs ``command`` until the block is left; the kernel ends it with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    bound = [sys.executable, "-I", "-S", bound_child.__file__, str(os.getpid())]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*bound, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        model = _wait_ready(url, process, log, began + _START_S)
        yield Running(name, url, model, time.monotonic() - began, process.pid)
    finally:
        _stop(process)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, ends_at: float) -> str:
    """The id of its model, once it says it and is healthy."""
    while True:
        if process.poll() is not None or time.monotonic() >= ends_at:
            said = log.read_text(errors="replace")[-2000:]
            raise UnavailableError(f"{log.stem} does not serve:\n{said}")
        with suppress(UnavailableError, httpx.HTTPError):
            get(url + "/health", timeout_s=5.0).raise_for_status()
            return str(fetch_json(url, "/v1/models", timeout_s=5.0)["data"][0]["id"])
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=_STOP_S)
        for each in left:
            each.kill()
    process.wait()
