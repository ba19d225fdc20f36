"""Renders the chart as `helm template` would, offline."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate.utils as kubernetes
import yaml

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "charts" / "baton"

GIVEN: Json = {
    "secrets": {
        "generate": False,
        "cluster": {"value": "a-secret"},
        "controllerToken": {"value": "a-token"},
        "apiKey": {"value": "a-key"},
        "rayToken": {"value": "a-ray-token"},
    },
    "redis": {"url": "redis://redis.data.svc:6379/0"},
    "rayRedis": {"address": "redis://ray-redis.data.svc:6379"},
}
"""What values.yaml leaves to be given."""

_TRIAL: Json = {
    "secrets": GIVEN["secrets"],
    "redis": {"embedded": {"password": {"value": "a-password"}}},
    "rayRedis": {"password": {"value": "another-password"}},
}


def merged(base: Json, over: Mapping[str, Any]) -> Json:
    """As Helm merges values: maps key by key, everything else replaced."""
    result = copy.deepcopy(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(value, Mapping) and isinstance(old, dict)
        result[key] = merged(old, value) if both else copy.deepcopy(value)
    return result


def values_file(name: str) -> Json:
    """A values file of the chart, with fixed secrets where it would have them generated."""
    values: Json = yaml.safe_load((CHART / name).read_text())
    return merged(values, _TRIAL) if values["secrets"].get("generate") else values


COMPLETE: dict[str, Json] = {
    "given": GIVEN,
    "values-cpu.yaml": values_file("values-cpu.yaml"),
    "values-h100-rdma.yaml": values_file("values-h100-rdma.yaml"),
}
"""Values that render, by a name for tests."""


class _Loader(yaml.CSafeLoader):
    """Refuses a key that is there twice, as Kubernetes does where it is strict."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice: {keys} {node.start_mark}"
        return super().construct_mapping(node, deep)


class Rendered:
    """The documents of one rendering."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.notes = files["baton/templates/NOTES.txt"]
        self.text = "\n---\n".join(
            text for name, text in sorted(files.items()) if name.endswith(".yaml")
        )
        loaded = yaml.load_all(self.text, Loader=_Loader)
        self.documents: list[Json] = [document for document in loaded if document]

    def all(self, kind: str) -> list[Json]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str = "") -> Json:
        """The only one of that kind whose name ends so."""
        (found,) = (d for d in self.all(kind) if d["metadata"]["name"].endswith(name))
        return found

    @property
    def ray(self) -> Json:
        spec: Json = self.one("RayCluster")["spec"]
        return spec

    def group(self, name: str) -> Json:
        (found,) = (g for g in self.ray["workerGroupSpecs"] if g["groupName"] == name)
        return dict(found)

    def worker(self, pool: str = "decode") -> Json:
        """The Ray container of a pool's pod."""
        container: Json = self.group(pool)["template"]["spec"]["containers"][0]
        return container

    @property
    def baton_yaml(self) -> str:
        text: str = self.one("ConfigMap")["data"]["baton.yaml"]
        return text

    def pod_specs(self) -> Iterator[tuple[str, Json]]:
        """Every pod's spec, with a name."""
        for kind in ("Deployment", "StatefulSet"):
            for document in self.all(kind):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]
        yield "head", self.ray["headGroupSpec"]["template"]["spec"]
        for group in self.ray["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]


@functools.cache
def _chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def render(
    values: Mapping[str, Any] | None = None, *over: Mapping[str, Any], name: str = "chat"
) -> Rendered:
    """``values`` (by default ``GIVEN``), then each of ``over``, on the chart's own.

    The same values give the same object: it is for looking at only. Raises: helm.HelmRenderError.
    """
    result = dict(GIVEN if values is None else values)
    for each in over:
        result = merged(result, each)
    return _render(json.dumps(result), name)


def refusal(over: Mapping[str, Any]) -> str:
    """What is said where ``GIVEN`` is refused with ``over``: a sentence for a person, which tells
    nothing of the templates' insides. AssertionError where it renders."""
    try:
        render(GIVEN, over)
    except helm.HelmRenderError as refused:
        said = str(refused)
        assert "nil pointer" not in said, said
        assert said.count("error calling") <= 1, said
        return said
    raise AssertionError(f"rendered: {over}")


@functools.cache
def _render(values: str, name: str) -> Rendered:
    return Rendered(_chart().render(json.loads(values), name=name, namespace="llm"))


@functools.cache
def _schema(filename: str, version: str) -> Any:
    return _load_schema(filename, version)


_load_schema = kubernetes.schema_contents


def validate(document: Json, version: str) -> None:
    """Strictly, against Kubernetes' own schema of that version. Raises its ValidationError."""
    # Reading the definitions takes most of the time, and kubernetes-validate keeps none.
    kubernetes.schema_contents = _schema
    kubernetes.validate(document, version, strict=True)
