"""vLLM's servers on given cores: one that does both, or two with NIXL between them and a proxy."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import servers
from benchmarks.engine.servers import Running
from benchmarks.interference.pinning import Cores, this_thread_on
from cluster.redis_server import free_port

_MAX_SEQS = 64
_CONNECTOR = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


@dataclass(frozen=True, slots=True)
class Instance:
    """One server of vLLM's. It starts, and stays, on ``cores``."""

    name: str
    cores: Cores
    max_num_batched_tokens: int | None = None
    """None: vLLM's own default."""
    hands_over: bool = False

    def command(self, port: int) -> list[str]:
        arguments = ["--max-num-seqs", str(_MAX_SEQS)]
        if self.max_num_batched_tokens is not None:
            arguments += ["--max-num-batched-tokens", str(self.max_num_batched_tokens)]
        if self.hands_over:
            arguments += ["--kv-transfer-config", json.dumps(_CONNECTOR)]
        return [
            *(servers.program("vllm", servers.PROGRAMS["vllm"]), "serve"),
            *(servers.bfloat16_folder(), "--dtype", "bfloat16"),
            *("--host", "127.0.0.1", "--port", str(port), *arguments),
        ]

    def environment(self) -> Mapping[str, str]:
        own = servers.vllm_environment(self.cores)
        if not self.hands_over:
            return own
        return {
            **own,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "UCX_NET_DEVICES": "lo",
        }


@contextmanager
def instance(wanted: Instance, folder: Path) -> Iterator[Running]:
    """Raises UnavailableError, and ConfigurationError where vLLM is not set up."""
    port = free_port()
    command, environment = wanted.command(port), wanted.environment()
    with (
        this_thread_on(wanted.cores),
        servers.peer(wanted.name, command, environment, port=port, folder=folder) as running,
    ):
        yield running


@contextmanager
def disaggregated(folder: Path, *, cores: Sequence[int]) -> Iterator[Sequence[Running]]:
    """A prefill instance on the first of the cores, a decode instance on the second, and the proxy
    on both. Yields the proxy, which is to be asked, and both instances. Raises as ``instance``."""
    first, second = cores
    wanted = (
        Instance("vllm-prefill", {first}, hands_over=True),
        Instance("vllm-decode", {second}, hands_over=True),
    )
    with ExitStack() as stack:
        prefill, decode = stack.enter_context(_at_once(wanted, folder))
        port = free_port()
        command = [
            *(sys.executable, "-m", "benchmarks.peers.proxy", "--port", str(port)),
            *("--prefill", prefill.url, "--decode", decode.url),
        ]
        with this_thread_on(set(cores)):
            proxy = stack.enter_context(
                servers.peer("proxy", command, {}, port=port, folder=folder)
            )
        yield proxy, prefill, decode


@contextmanager
def _at_once(wanted: Sequence[Instance], folder: Path) -> Iterator[Sequence[Running]]:
    """Each takes a minute to start. A thread stays for each: the kernel ends a process with the
    thread that started it."""
    leave = threading.Event()
    ready: list[Future[Running]] = [Future() for _ in wanted]

    def hold(each: Instance, running: Future[Running]) -> None:
        try:
            with instance(each, folder) as found:
                running.set_result(found)
                leave.wait()
        except Exception as error:
            if running.done():
                raise
            running.set_exception(error)

    threads = [
        threading.Thread(target=hold, args=arguments, name=arguments[0].name)
        for arguments in zip(wanted, ready, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield [each.result() for each in ready]
    finally:
        leave.set()
        for thread in threads:
            thread.join()
