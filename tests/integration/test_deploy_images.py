"""The Dockerfiles, as far as they can be judged without building them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.dockerfile import Stage, read_dockerfile

from baton.worker.environment import WORKER_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = {path.name: path for path in sorted((ROOT / "deploy").glob("*.Dockerfile"))}
PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+\.\d+[a-z0-9.-]*")
INSTALL = ["python", "deploy/install.py"]


@pytest.fixture(params=DOCKERFILES)
def stages(request: pytest.FixtureRequest) -> list[Stage]:
    return read_dockerfile(DOCKERFILES[request.param])


def copied(stage: Stage) -> list[str]:
    """Sources of the COPYs out of the build context."""
    return [
        source
        for copy in stage.all("COPY")
        if not copy.value.startswith("--from")
        for source in copy.words[:-1]
    ]


def test_there_is_an_image_for_each_kind_that_the_script_installs() -> None:
    done = subprocess.run(
        [sys.executable, "deploy/install.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    kinds = re.search(r"\{(.*?)\}", done.stdout)
    assert kinds is not None, done.stderr
    assert {f"{kind}.Dockerfile" for kind in kinds[1].split(",")} == set(DOCKERFILES)


def test_every_stage_begins_with_one_base_pinned_to_a_patch_version(stages: list[Stage]) -> None:
    assert len(stages) == 2
    assert len({stage.base for stage in stages}) == 1
    assert PINNED.fullmatch(stages[0].base), stages[0].base


def test_base_has_a_python_that_the_package_supports(stages: list[Stage]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    version = re.fullmatch(r"python:3\.(\d+)\.\d+-slim-.*", stages[0].base)
    assert oldest is not None
    assert version is not None
    assert int(oldest[1]) <= int(version[1]) <= 14


def test_image_is_filled_by_the_install_script_and_nothing_else(
    stages: list[Stage], request: pytest.FixtureRequest
) -> None:
    build, runtime = stages
    *prepared, run = build.all("RUN")
    kind = request.node.callspec.params["stages"].removesuffix(".Dockerfile")
    assert run.words == [*INSTALL, kind, "--into", "/opt/baton", "$INSTALL_OPTIONS"]
    # What compiles stays in the stage that does: for the CPU kernels.
    assert ["g++" in step.words for step in prepared] == [True] * (kind == "worker-cpu")
    assert not runtime.all("RUN")[1:]
    assert not copied(runtime)
    (copy,) = runtime.all("COPY")
    assert copy.words == ["--from=build", "/opt/baton", "/opt/baton"]
    assert runtime.environment()["PATH"].startswith("/opt/baton/bin:")


def test_what_is_copied_exists_and_reaches_the_build(stages: list[Stage]) -> None:
    ignored, *admitted = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ignored == "*"
    allowed = [line[1:] for line in admitted if line.startswith("!")]
    for source in copied(stages[0]):
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source


def test_every_package_of_the_wheel_is_copied(stages: list[Stage]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(packages) <= set(copied(stages[0]))


def test_image_runs_as_a_fixed_user_that_is_not_root(stages: list[Stage]) -> None:
    runtime = stages[-1]
    names = [each.name for each in runtime.instructions]
    (user,) = runtime.all("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user.value), user.value
    assert "RUN" not in names[names.index("USER") :]
    uid, _, gid = user.value.partition(":")
    assert f"--uid {uid} --gid {gid}" in runtime.all("RUN")[0].value


def test_image_runs_a_module_without_a_shell(stages: list[Stage]) -> None:
    assert stages[-1].entrypoint()[:2] == ["python", "-m"]


def test_worker_images_have_what_a_worker_reads_before_its_first_import() -> None:
    for name in ("worker-cpu.Dockerfile", "worker-cuda.Dockerfile"):
        environment = read_dockerfile(DOCKERFILES[name])[-1].environment()
        assert environment.items() >= WORKER_ENVIRONMENT.items()
