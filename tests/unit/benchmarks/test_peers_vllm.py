"""How vLLM is started on given cores: with a program in its place that says how it was."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from baton.errors import ConfigurationError, UnavailableError
from benchmarks.engine import servers
from benchmarks.peers import vllm

PROGRAM = '''#!{python}
"""Serves as vLLM does; a chat's answer is what the program knows of itself."""
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

if os.environ["VLLM_CPU_OMP_THREADS_BIND"] == os.environ.get("FAILING_CORE"):
    sys.exit("it cannot start")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"data": [{{"id": "a-model"}}]}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({{
            "arguments": sys.argv[1:],
            "cores": sorted(os.sched_getaffinity(0)),
            "bound": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
            "side_port": os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT"),
            "asked": asked.get("kv_transfer_params"),
            "kv_transfer_params": {{"prefilled_on": sorted(os.sched_getaffinity(0))}},
        }})

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores to tell them apart"
)


@pytest.fixture
def cores() -> tuple[int, int]:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    return first, second


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "peers" / "vllm" / "bin" / "vllm"
    file.parent.mkdir(parents=True)
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("BATON_PEERS", str(tmp_path / "peers"))
    monkeypatch.setattr(servers, "bfloat16_folder", lambda: "/the/model")
    return file


def chat(url: str) -> dict:
    answer = httpx.post(url + "/v1/chat/completions", json={"max_tokens": 5}, timeout=10)
    answer.raise_for_status()
    return answer.json()


@pytest.mark.usefixtures("program")
def test_prefill_and_decode_have_a_core_each_and_the_proxy_both(
    tmp_path: Path, cores: tuple[int, int]
) -> None:
    before = os.sched_getaffinity(0)
    with vllm.disaggregated(tmp_path, cores=cores) as (proxy, prefill, decode):
        told, of_prefill = chat(proxy.url), chat(prefill.url)
        pids = [each.pid for each in (proxy, prefill, decode)]
        assert psutil.Process(proxy.pid).cpu_affinity() == list(cores)
        assert os.sched_getaffinity(0) == before
    assert told["cores"] == [cores[1]]
    assert told["bound"] == str(cores[1])
    assert told["asked"] == {"prefilled_on": [cores[0]]}
    assert of_prefill["bound"] == str(cores[0])
    assert of_prefill["side_port"] != told["side_port"]
    assert any("NixlConnector" in each for each in told["arguments"])
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.usefixtures("program")
def test_one_that_does_both_has_the_cores_and_the_step_that_it_is_given(
    tmp_path: Path, cores: tuple[int, int]
) -> None:
    wanted = vllm.Instance("vllm", set(cores), max_num_batched_tokens=128)
    with vllm.instance(wanted, tmp_path) as running:
        told = chat(running.url)
    at = told["arguments"].index("--max-num-batched-tokens")
    assert told["arguments"][at + 1] == "128"
    assert told["cores"] == list(cores)
    assert told["side_port"] is None


@pytest.mark.usefixtures("program")
def test_where_one_instance_cannot_start_the_other_is_ended(
    tmp_path: Path, cores: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING_CORE", str(cores[1]))
    with (
        pytest.raises(UnavailableError, match="it cannot start"),
        vllm.disaggregated(tmp_path, cores=cores),
    ):
        pass
    children = psutil.Process().children(recursive=True)
    assert not [each for each in children if each.name().startswith("vllm")]


def test_a_vllm_that_is_not_set_up_is_named_with_the_command_for_it(
    tmp_path: Path, cores: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_PEERS", str(tmp_path))
    with (
        pytest.raises(ConfigurationError, match=r"setup\.sh vllm"),
        vllm.disaggregated(tmp_path, cores=cores),
    ):
        pass
