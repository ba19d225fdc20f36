"""Ranks as processes of their own live and die together, within a second."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_architectures import Variant, save_variant

from baton.errors import InternalError
from baton.kv_layout import KvLayout
from baton.parallelism import Parallelism
from engine.parallel import rank_processes
from engine.parallel.followers import Followers, RankTask
from engine.parallel.rank_processes import RankProcesses
from kv_transfer.memory import KvMemory

THREE_HEADS = Variant(
    "Llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_variant(folder, THREE_HEADS)
    return folder


def lead(model: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.rank_leader", str(model), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def followers_of(leader: subprocess.Popen[str], *, num_steps: int = 1) -> list[int]:
    """Once so many steps are computed; more are under way."""
    assert leader.stdout is not None
    pids = [int(pid) for pid in leader.stdout.readline().split()]
    for _ in range(num_steps):
        assert leader.stdout.readline() == "step\n"
    return pids


def all_gone(pids: list[int]) -> Callable[[], bool]:
    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    return lambda: all(is_gone(pid) for pid in pids)


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def kill_rank(model: Path, rank: int, num_steps: int) -> float:
    """Kills a rank in the step after so many. Returns how long it took until all were gone."""
    with lead(model) as leader:
        try:
            pids = followers_of(leader, num_steps=num_steps)
            began = time.monotonic()
            os.kill(pids[rank - 1], signal.SIGKILL)
            assert leader.wait(10) == 1
            wait_until(all_gone(pids), timeout_s=10)
            took_s = time.monotonic() - began
        finally:
            leader.kill()
        assert leader.stderr is not None
        log = leader.stderr.read()
    said = f"CRITICAL decode-0 rank {rank} of decode-0 was killed by SIGKILL; this worker ends"
    assert said in log, log
    return took_s


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_kills", [1, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_rank_that_is_killed_at_any_step_takes_its_worker_with_it(
    model: Path, num_kills: int
) -> None:
    draw = random.Random(0)
    took_s = [kill_rank(model, draw.choice([1, 2]), draw.randint(1, 20)) for _ in range(num_kills)]
    print(f"all three were gone after {[round(each * 1000) for each in took_s]} ms")


@pytest.mark.parametrize("is_stopped", [False, True], ids=["in a step", "stopped"])
def test_leader_that_is_killed_takes_its_ranks_with_it(model: Path, is_stopped: bool) -> None:
    with lead(model) as leader:
        try:
            pids = followers_of(leader)
            if is_stopped:
                os.kill(pids[0], signal.SIGSTOP)
            leader.kill()
            wait_until(all_gone(pids), timeout_s=10)
        finally:
            leader.kill()


def test_leader_that_closes_ends_its_ranks_and_nobody_complains(model: Path) -> None:
    with lead(model, "once") as leader:
        pids = followers_of(leader)
        assert leader.wait(30) == 0
        assert all_gone(pids)()
        assert leader.stderr is not None
        assert leader.stderr.read() == ""


def test_rank_that_cannot_start_is_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(rank_processes.sys, "executable", "/bin/false")
    processes = RankProcesses(1, worker_id="decode-0", on_death=said.append)
    wait_until(lambda: bool(said), timeout_s=10)
    processes.close()
    assert said == ["rank 1 of decode-0 ended with status 1"]


def test_rank_that_does_not_end_by_itself_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    program = tmp_path / "sleep"
    program.write_text("#!/bin/sh\nexec sleep 100\n")
    program.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_processes.sys, "executable", str(program))
        processes = RankProcesses(2, worker_id="decode-0", on_death=said.append)
    processes.close(timeout_s=0.1)
    wait_until(all_gone(processes.pids), timeout_s=10)
    assert said == []


def test_rank_that_finds_another_model_ends_before_it_computes(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    parallel = Parallelism(2)
    processes = RankProcesses(1, worker_id="decode-0", on_death=said.append)
    layout = KvLayout(4, 3, 2, 16, 16, "float32")
    memory = KvMemory(layout.num_bytes, sealed=False)
    task = RankTask(str(model), "auto", "another", "float32", layout, 1, parallel)
    followers = Followers.lead(processes.connections, task, memory.fd)
    with pytest.raises(InternalError, match="rank 1 ended before it was ready"):
        followers.wait_ready()
    wait_until(lambda: bool(said), timeout_s=10)
    processes.close()
    memory.close()
    assert said == ["rank 1 of decode-0 ended with status 1"]
    assert "has changed since this worker began to start" in capfd.readouterr().err
