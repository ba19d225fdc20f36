"""The launcher's folder: one at a time, and no stale state is believed."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import UnavailableError
from cluster.procfs import name_of
from cluster.state import RunFolder, ServerState, make_temp_folder, state_root


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def state_of_this_process(temp_folder: str = "/tmp/baton-none") -> ServerState:
    me = name_of(os.getpid())
    assert me is not None
    return ServerState(
        pid=me.pid,
        start_time=me.start_time,
        url="http://127.0.0.1:8000",
        cluster="default",
        stop_within_s=30.0,
        temp_folder=temp_folder,
        controller_url="http://127.0.0.1:8001",
        controller_token="token",
    )


def test_second_launcher_is_refused_and_told_of_the_first() -> None:
    first = RunFolder("default")
    first.lock()
    first.write(state_of_this_process())
    with pytest.raises(UnavailableError, match=rf"pid {os.getpid()}, http://127.0.0.1:8000"):
        RunFolder("default").lock()
    other = RunFolder("other")
    other.lock()
    other.unlock()
    first.unlock()
    RunFolder("default").lock()


def test_state_is_found_while_its_process_lives_and_gone_after_unlock() -> None:
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of_this_process())
    assert RunFolder("default").running() == state_of_this_process()
    folder.unlock()
    assert RunFolder("default").running() is None


def test_state_of_a_recycled_pid_is_not_believed() -> None:
    folder = RunFolder("default")
    folder.lock()
    mine = state_of_this_process()
    folder.write(replace(mine, start_time=mine.start_time - 1))
    assert RunFolder("default").running() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '"text"'])
def test_damaged_state_is_no_state(content: str) -> None:
    folder = RunFolder("default")
    folder.lock()
    (folder.path / "state.json").write_text(content)
    assert folder.running() is None
    folder.prepare()


def test_folder_is_private(state_dir: Path) -> None:
    folder = RunFolder("default")
    folder.lock()
    assert stat.S_IMODE((state_dir / "default").stat().st_mode) == 0o700


def test_state_holds_a_secret_and_is_its_owners_alone(state_dir: Path) -> None:
    folder = RunFolder("default")
    folder.lock()
    for _ in range(2):
        folder.write(state_of_this_process())
        file = state_dir / "default" / "state.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    state = folder.running()
    assert state is not None
    assert state.controller_token == "token"
    assert "token=" not in repr(state)


def test_prepare_keeps_the_logs_of_one_earlier_run() -> None:
    folder = RunFolder("default")
    folder.lock()
    for run in ("one", "two", "three"):
        folder.prepare()
        (folder.logs / "gateway-0.log").write_text(run)
    assert (folder.logs / "gateway-0.log").read_text() == "three"
    assert (folder.path / "logs.old" / "gateway-0.log").read_text() == "two"


def test_prepare_removes_a_killed_launchers_temp_folder() -> None:
    temp = make_temp_folder()
    (temp / "redis.conf").write_text("requirepass secret")
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of_this_process(str(temp)))
    folder.prepare()
    assert not temp.exists()


def test_prepare_removes_nothing_but_temp_folders(tmp_path: Path) -> None:
    precious = tmp_path / "baton-precious"
    precious.mkdir()
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of_this_process(str(precious)))
    folder.prepare()
    assert precious.exists()


def test_log_tail_is_the_end_of_the_log() -> None:
    folder = RunFolder("default")
    folder.lock()
    folder.prepare()
    lines = [f"line {i}" for i in range(10_000)]
    (folder.logs / "decode-0.log").write_text("\n".join(lines))
    assert folder.log_tail("decode-0", 3) == lines[-3:]
    assert folder.log_tail("decode-1") == []


def test_state_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert state_root() == Path("/x/baton")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert state_root() == Path("/home/somebody/.local/state/baton")


def test_state_file_is_plain_json(state_dir: Path) -> None:
    folder = RunFolder("default")
    folder.lock()
    folder.write(state_of_this_process())
    data = json.loads((state_dir / "default" / "state.json").read_text())
    assert data["pid"] == os.getpid()
