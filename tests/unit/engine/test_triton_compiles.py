"""The Triton kernels compile for GPUs that are not here: to their machine code, by ptxas."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""That one block of threads may have, by compute capability."""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs the package triton (pip install triton)",
)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_spills_nothing(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_kernels", str(capability)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 11
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_BYTES[capability], kernel
        assert kernel["spilled"] == 0, kernel
