"""The check that holds the committed gRPC stubs in step with proto/."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script looks at."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "stubs.py", tmp_path / "scripts")
    for package in ("baton", "kv_transfer"):
        shutil.copytree(ROOT / package / "v1", tmp_path / package / "v1")
    return tmp_path


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(checkout / "scripts" / "stubs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_committed_stubs_are_in_step(checkout: Path) -> None:
    done = run(checkout, "--check")
    assert done.returncode == 0, done.stderr


def test_changed_proto_is_noticed_and_generating_anew_repairs_it(checkout: Path) -> None:
    proto = checkout / "proto" / "kv_transfer" / "v1" / "transfer.proto"
    proto.write_text(proto.read_text() + "\nmessage Extra { uint32 number = 1; }\n")
    done = run(checkout, "--check")
    assert done.returncode == 1
    assert "kv_transfer/v1/transfer_pb2.py is not" in done.stderr
    assert "make proto" in done.stderr
    assert run(checkout).returncode == 0
    assert run(checkout, "--check").returncode == 0


def test_stub_without_a_proto_is_noticed(checkout: Path) -> None:
    (checkout / "baton" / "v1" / "old_pb2.py").write_text("")
    done = run(checkout, "--check")
    assert done.returncode == 1
    assert "baton/v1/old_pb2.py" in done.stderr
