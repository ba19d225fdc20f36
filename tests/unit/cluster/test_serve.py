"""What `baton serve` does around its processes: signals, checks, status, stop."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cluster.serve as serve_module
import cluster.status as status_module
from baton.config import parse_config
from baton.errors import UnavailableError
from cluster.controller_client import ControllerAddress, PoolRow
from cluster.procfs import name_of
from cluster.serve import StopSignals, check
from cluster.server_client import parse_status, url_of
from cluster.state import RunFolder, ServerState
from cluster.status import known_url, show_status, status_table, stop_server


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_STATE_DIR", str(tmp_path / "state"))


async def test_first_signal_stops_and_a_later_one_hurries(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(serve_module.time, "monotonic", lambda: now)
    signals = StopSignals()
    signals.received()
    assert signals.stop.is_set()
    signals.received()
    assert not signals.hurry.is_set(), "one Ctrl-C can arrive twice, from terminal and make"
    now = 101.0
    signals.received()
    assert signals.hurry.is_set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_signals_reach_the_event_also_after_others_took_them(number: int) -> None:
    signals = StopSignals()
    signals.install()
    signal.signal(number, signal.SIG_DFL)  # as a library may
    signals.install()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(signals.stop.wait(), 10)
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(one)


class FakeLauncher:
    """Is lost as soon as it is asked, or never."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason

    async def wait_lost(self) -> str:
        if self.reason is None:
            await asyncio.Event().wait()
        return str(self.reason)


@pytest.mark.parametrize("name", ["BATON_API_KEY", "BATON_SECRET", "BATON_CONTROLLER_TOKEN"])
def test_key_that_can_be_none_is_refused_before_anything_starts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_module, "check", lambda config: (config, (0,)))
    monkeypatch.setattr(serve_module, "_serve", lambda *_: pytest.fail("it went on"))
    monkeypatch.setenv(name, "two words")
    assert serve_module.serve(parse_config({}), redis_url=None) == 2
    assert f"{name} has whitespace inside" in capsys.readouterr().err


async def test_lost_cluster_ends_the_server_with_the_reason() -> None:
    stop = asyncio.create_task(asyncio.Event().wait())
    launcher: Any = FakeLauncher("Ray has died")
    with pytest.raises(UnavailableError, match="Ray has died; stopping everything"):
        await asyncio.wait_for(serve_module._wait_end(launcher, stop), 10)
    stop.cancel()


async def test_stop_that_was_asked_for_ends_the_server_without_an_error() -> None:
    asked = asyncio.Event()
    asked.set()
    launcher: Any = FakeLauncher(None)
    stop = asyncio.create_task(asked.wait())
    await asyncio.wait_for(serve_module._wait_end(launcher, stop), 10)


def test_check_fills_in_port_threads_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module.preflight, "local_model", lambda _: "/abs/model")
    config, ports = check(parse_config({"model": "model", "gateway": {"port": 0}}))
    assert ports == (config.gateway.port,)
    assert config.gateway.port > 0
    assert config.engine.threads == serve_module.preflight.default_threads(config)
    assert config.model == "/abs/model"
    chosen, _ = check(parse_config({"engine": {"threads": 7}, "gateway": {"port": 0}}))
    assert chosen.engine.threads == 7


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("gpu-1", "http://gpu-1:80"),
    ],
)
def test_url_is_one_that_this_machine_can_use(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def worker(worker_id: str, role: str, **over: Any) -> dict[str, Any]:
    return {
        "worker_id": worker_id,
        "role": role,
        "epoch": "00",
        "address": "127.0.0.1:1",
        "ready": True,
        "model": "m",
        "num_running": 1,
        "num_waiting": 2,
        "num_free_blocks": 50,
        "num_cached_blocks": 20,
        "num_referenced_blocks": 25,
        "num_quarantined_blocks": 5,
        "num_blocks": 100,
        "block_size": 16,
        "num_ranks": 1,
        **over,
    }


PAGE = {
    "model": "m",
    "missing": [],
    "degraded": [],
    "workers": [
        worker("decode-10", "decode"),
        worker("decode-2", "decode", ready=False),
        worker("prefill-0", "prefill"),
    ],
}


def test_status_page_is_read_in_the_order_of_pools_and_numbers() -> None:
    status = parse_status(PAGE)
    assert [row.worker_id for row in status.workers] == ["prefill-0", "decode-2", "decode-10"]
    assert [row.worker_id for row in status.ready_workers("decode")] == ["decode-10"]
    assert status.workers[0].used_share == pytest.approx(0.30)


def test_worker_without_blocks_uses_none_of_them() -> None:
    page = {**PAGE, "workers": [worker("decode-0", "decode", num_blocks=0)]}
    assert parse_status(page).workers[0].used_share == 0.0


@pytest.mark.parametrize("page", [{}, {"workers": [{}], "missing": []}, {"workers": 3}, []])
def test_page_of_another_server_is_refused(page: Any) -> None:
    with pytest.raises(UnavailableError, match="no Baton gateway"):
        parse_status(page)


def test_status_table_shows_use_of_the_cache() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(status_table(parse_status(PAGE)))
    assert isinstance(console.file, io.StringIO)
    row = next(line for line in console.file.getvalue().splitlines() if "prefill-0" in line)
    assert "30.0%" in row
    assert "20.0%" in row


def test_status_table_shows_ranks_where_a_worker_has_several() -> None:
    def shown(*workers: dict[str, Any]) -> list[list[str]]:
        console = Console(file=io.StringIO(), width=120)
        console.print(status_table(parse_status({**PAGE, "workers": list(workers)})))
        assert isinstance(console.file, io.StringIO)
        return [line.split() for line in console.file.getvalue().splitlines()]

    one, three = worker("prefill-0", "prefill"), worker("decode-0", "decode", num_ranks=3)
    assert "ranks" not in shown(one)[0]
    heading, *rows = shown(one, three)
    assert [row[heading.index("ranks")] for row in rows] == ["1", "3"]


def test_status_says_what_is_missing_or_degraded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = {**PAGE, "missing": ["No one."], "degraded": ["No hand-offs."]}
    monkeypatch.setattr(status_module, "fetch_json", lambda url, path: page)
    status_module.show_status("none-runs-here", "http://127.0.0.1:1", as_json=False)
    said = capsys.readouterr().out
    assert "missing: No one.\n" in said
    assert "degraded: No hand-offs.\n" in said


def state_of(pid: int, **over: Any) -> ServerState:
    name = name_of(pid)
    assert name is not None
    values: dict[str, Any] = {
        "pid": pid,
        "start_time": name.start_time,
        "url": "http://127.0.0.1:1234",
        "cluster": "default",
        "stop_within_s": 20.0,
        "temp_folder": "",
        "controller_url": "http://127.0.0.1:1235",
        "controller_token": "token",
        **over,
    }
    return ServerState(**values)


def test_known_url_is_that_of_the_running_server() -> None:
    assert known_url("default") == "http://127.0.0.1:8000"
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of(os.getpid()))
    assert known_url("default") == "http://127.0.0.1:1234"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> ServerState:
    """A server that runs here, whose gateway answers with ``PAGE``."""
    monkeypatch.setattr(status_module, "fetch_json", lambda *_: PAGE)
    folder = RunFolder("default")
    folder.lock()
    state = state_of(os.getpid())
    folder.write(state)
    return state


def test_status_shows_how_large_the_pools_should_be(
    served: ServerState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pools = {"decode": PoolRow("decode", 3, 2, 1, 1, 8)}
    monkeypatch.setattr(ControllerAddress, "pools", lambda _: pools)
    show_status("default", None, as_json=False)
    assert "decode: 1 of 3 ready, 1 leaving" in capsys.readouterr().out
    show_status("default", "http://elsewhere:1", as_json=False)
    assert "of 3 ready" not in capsys.readouterr().out, "another server's pools were shown"


def test_status_does_without_a_controller_that_does_not_answer(
    served: ServerState, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pools(_: ControllerAddress) -> dict[str, PoolRow]:
        raise UnavailableError("no controller answers")

    monkeypatch.setattr(ControllerAddress, "pools", pools)
    show_status("default", None, as_json=False)
    assert "prefill-0" in capsys.readouterr().out


LAUNCHER = """
import os, signal, sys, time
def end(*_):
    os.write(1, b"asked\\n")  # print would not do in the middle of another print
    sys.exit(0)
signal.signal(signal.SIGTERM, end if sys.argv[1] == "heeds" else lambda *_: None)
print("up", flush=True)
time.sleep(60)
"""


def start_launcher(behaviour: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, behaviour], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


def test_stop_asks_the_launcher_and_waits_for_its_end() -> None:
    child = start_launcher("heeds")
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of(child.pid))
    assert "stopped http://127.0.0.1:1234" in stop_server("default", now=False)
    assert child.wait() == 0
    assert child.stdout is not None
    assert child.stdout.read() == "asked\n"
    child.stdout.close()


def test_stop_of_a_launcher_that_hangs_says_how_to_end_it() -> None:
    child = start_launcher("ignores")
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of(child.pid, stop_within_s=0.2))
    with pytest.raises(UnavailableError, match=f"kill -9 {child.pid}"):
        stop_server("default", now=False)
    child.kill()
    child.communicate()


def test_stop_never_signals_a_recycled_pid() -> None:
    child = start_launcher("heeds")
    folder = RunFolder("default")
    folder.lock()
    state = state_of(child.pid)
    folder.write(state_of(child.pid, start_time=state.start_time - 1))
    with pytest.raises(UnavailableError, match="no server"):
        stop_server("default", now=False)
    assert child.poll() is None
    child.kill()
    child.communicate()
