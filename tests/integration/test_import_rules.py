"""What importing a part of Baton loads, each seen in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = "import sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_after(statement: str) -> set[str]:
    """Top-level names of all modules in a fresh interpreter after ``statement``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\n{REPORT}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module",
    [
        "router.main",
        "baton.v1.session_pb2_grpc",
        "kv_transfer.v1.transfer_pb2_grpc",
        "baton.checkpoint.checkpoint",
        "cluster.cli",
        "cluster.serve",
        "cluster.launcher",
        "cluster.ray_backend",
        "cluster.ray_actor",
    ],
)
def test_import_loads_neither_torch_nor_ray(module: str) -> None:
    assert loaded_after(f"import {module}").isdisjoint({"torch", "ray"})


@pytest.mark.parametrize("module", ["prefill_workers.main", "decode_workers.main"])
def test_worker_loads_neither_ray_nor_the_gateways_framework(module: str) -> None:
    assert loaded_after(f"import {module}").isdisjoint({"ray", "fastapi", "router", "cluster"})


def test_help_loads_nothing_heavy() -> None:
    run = (
        "import sys\n"
        "from cluster.cli import app\n"
        "sys.argv = ['baton', '--help']\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert end.code == 0, end.code"
    )
    heavy = {"torch", "ray", "grpc", "pydantic", "httpx", "redis", "numpy", "yaml"}
    assert loaded_after(run).isdisjoint(heavy)


def test_the_check_itself_sees_what_is_loaded() -> None:
    assert "ray" in loaded_after("import ray")
