"""Images that were never built: what each would hold, taken from its Dockerfile and the
environment that the install script made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.dockerfile import read_dockerfile
from support.installed import ROOT, Installed

from cluster.redis_server import find_redis_server

_SYSTEM = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Image:
    environment: Mapping[str, str]
    entrypoint: tuple[str, ...]


def image_of(reference: str, installed: Installed, home: Path) -> Image:
    """The image that a manifest names. ``home`` stands for its user's folder.
    AssertionError for one that no Dockerfile of ours makes."""
    found = [
        path
        for path in (ROOT / "deploy").glob("*.Dockerfile")
        if f" -t {reference} ." in path.read_text()
    ]
    assert len(found) == 1, f"no Dockerfile says that it makes {reference}"
    stage = read_dockerfile(found[0])[-1]
    folder = str(installed.environment(found[0].name.removesuffix(".Dockerfile")))
    environment = {
        name: value.replace("/opt/baton", folder)
        .replace("$PATH", _SYSTEM)
        .replace("/home/baton", str(home))
        for name, value in stage.environment().items()
    }
    own = {"HOME": str(home), "LANG": os.environ.get("LANG", "C.UTF-8")}
    return Image({**own, **environment}, tuple(stage.entrypoint()))


def on_loopback(image: Image, folder: Path) -> Image:
    """The same with a ``ray`` that works with several nodes on one machine's loopback."""
    folder.mkdir()
    file = folder / "ray"
    script = Path(__file__).with_name("loopback_ray.py")
    file.write_text(f'#!/bin/sh\nexec python {script} "$@"\n')
    file.chmod(0o755)
    path = f"{folder}:{image.environment['PATH']}"
    return Image({**image.environment, "PATH": path}, image.entrypoint)


def redis_image(folder: Path, port: int) -> Image:
    """Redis's own image, whose server is on loopback and on ``port`` instead of 6379."""
    server = Path(find_redis_server()).resolve()
    folder.mkdir()
    for name, program, more in (
        ("redis-server", server, f"--bind 127.0.0.1 --port {port}"),
        ("redis-cli", server.with_name("redis-cli"), ""),
    ):
        file = folder / name
        first = "" if more else f"-p {port} "
        file.write_text(f'#!/bin/sh\nexec {program} {first}"$@" {more}\n')
        file.chmod(0o755)
    return Image({"PATH": f"{folder}:{_SYSTEM}"}, ("redis-server",))
