"""A compose file, resolved as Docker would: what each service runs, and with what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.dockerfile import Stage, read_dockerfile

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """``${NAME}``, ``${NAME:-default}`` and ``${NAME:?why}`` in every string of ``value``.
    KeyError with the reason for one that is required and not given."""

    def replace(match: re.Match[str]) -> str:
        name, kind, rest = match[1], match[2], match[3]
        if variables.get(name):
            return variables[name]
        if kind == "-":
            return rest
        raise KeyError(f"{name}: {rest}")

    if isinstance(value, str):
        return _VARIABLE.sub(replace, value)
    if isinstance(value, Mapping):
        return {key: interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, variables) for each in value]
    return value


@dataclass(frozen=True, slots=True)
class Service:
    """One container's worth of a compose file."""

    name: str
    image: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[str, str]
    """Path in the container → content."""
    healthcheck: tuple[str, ...]
    stop_s: float
    definition: Mapping[str, Any]
    stage: Stage | None
    """Of its image, where that is ours."""


def read_services(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """Every service of the file at ``path``."""
    document = interpolated(yaml.safe_load(path.read_text()), variables)
    return {
        name: _service(name, definition, document.get("configs", {}), path.parent)
        for name, definition in document["services"].items()
    }


def _service(
    name: str, definition: Mapping[str, Any], configs: Mapping[str, Any], folder: Path
) -> Service:
    stage, entrypoint, environment = None, [], {}
    if build := definition.get("build"):
        stage = read_dockerfile(folder / build["context"] / build["dockerfile"])[-1]
        entrypoint, environment = stage.entrypoint(), stage.environment()
    files = {}
    for use in definition.get("configs", []):
        config = configs[use["source"]]
        content = (
            config["content"] if "content" in config else (folder / config["file"]).read_text()
        )
        files[use["target"]] = content
    kind, *healthcheck = definition["healthcheck"]["test"]
    assert kind == "CMD", "a health check without a shell"
    return Service(
        name=name,
        image=definition["image"],
        arguments=(*entrypoint, *definition["command"]),
        environment={**environment, **definition.get("environment", {})},
        files=files,
        healthcheck=tuple(healthcheck),
        stop_s=float(str(definition.get("stop_grace_period", "10s")).removesuffix("s")),
        definition=definition,
        stage=stage,
    )
