"""The set-up: when it has nothing to do, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without packages, whose .venv/bin/python is this interpreter."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path


def load(checkout: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One of the scripts as a module; it and what it imports are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(checkout / "scripts"), *sys.path])
    for script in ("setup_stamp", "setup_env"):
        monkeypatch.delitem(sys.modules, script, raising=False)
    spec = importlib.util.spec_from_file_location(name, checkout / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "setup_stamp", raising=False)
    return module


def is_current(checkout: Path, python: str = "") -> bool:
    command = [sys.executable, "-I", "-S", "scripts/setup_stamp.py", "--is-current", python]
    return subprocess.run(command, cwd=checkout).returncode == 0


def write_stamp(checkout: Path) -> None:
    """As a set-up with this interpreter does when it is done."""
    code = "from setup_stamp import *; STAMP.write_text(wanted(own_identity()))"
    subprocess.run([sys.executable, "-c", code], cwd=checkout / "scripts", check=True)


def test_set_up_environment_is_current_until_what_it_was_made_from_changes(
    checkout: Path,
) -> None:
    assert not is_current(checkout)
    write_stamp(checkout)
    assert is_current(checkout)
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    assert not is_current(checkout)


def test_moved_environment_is_not_current(checkout: Path) -> None:
    write_stamp(checkout)
    moved = checkout.with_name(checkout.name + "-moved")
    checkout.rename(moved)
    assert not is_current(moved)


def test_environment_of_another_python_than_the_chosen_is_not_current(checkout: Path) -> None:
    write_stamp(checkout)
    assert is_current(checkout, sys.executable)
    assert not is_current(checkout, "/bin/echo")


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    return subprocess.run(
        [shell, str(checkout / "scripts" / "setup.sh")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_unsuitable_chosen_python_gets_a_sentence(checkout: Path) -> None:
    old = checkout / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = set_up(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert f"PYTHON={old} is no Python of 3.11 to 3.14" in done.stderr


def test_machine_without_a_suitable_python_is_told_what_to_install(checkout: Path) -> None:
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("dirname",):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    done = set_up(checkout, PATH=str(tools), PYTHON="")
    assert done.returncode == 1
    assert "needs Python 3.11 to 3.14, and there is no python3 at all" in done.stderr
    assert "apt-get install" in done.stderr


def test_missing_venv_module_is_told_what_to_install(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load(checkout, "setup_env", monkeypatch)
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: name == "venv" or None)
    with pytest.raises(SystemExit, match="lacks the module ensurepip; install python3-venv"):
        script.check_modules()


def test_failing_pip_shows_its_last_lines(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = load(checkout, "setup_env", monkeypatch)
    fake = checkout / ".venv" / "bin" / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: no matching distribution' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit, match="pip failed"):
        script.pip("install", "x")
    assert "ERROR: no matching distribution" in capfd.readouterr().err
    assert "no matching distribution" in (checkout / ".venv" / "setup.log").read_text()


def test_second_set_up_waits_for_the_first_and_then_finds_it_done(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    script = load(checkout, "setup_env", monkeypatch)
    first = script.only_one()
    second = subprocess.Popen(
        [sys.executable, "-I", "scripts/setup_env.py"],
        cwd=checkout,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout is not None
    assert "waiting for it" in second.stdout.readline()
    write_stamp(checkout)
    first.close()
    rest, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert rest == ""
