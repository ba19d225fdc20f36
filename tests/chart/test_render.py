"""Every values file lints, renders, and is valid to the last key."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import pytest
import yaml
from support.chart import CHART, COMPLETE, GIVEN, ROOT, Rendered, render, validate

Json = dict[str, Any]

VERSIONS = ["1.30", "1.37"]

EVERYTHING: Json = {
    "model": {"source": "pvc", "path": "some/model", "pvc": {"claimName": "models"}},
    "gateway": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": 0.5}}},
    "controller": {"resources": {"requests": {"cpu": 0.25}}},
    "ray": {
        "autoscaling": {"enabled": True, "resources": {"requests": {"cpu": 0.2}}},
        "head": {"dashboard": True, "resources": {"requests": {"cpu": 0.5}}, "shmSize": 1.5e9},
    },
    "monitoring": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}},
    "redis": {
        "url": "",
        "embedded": {
            "enabled": True,
            "password": {"value": "p"},
            "persistence": {"enabled": True, "size": 1.5e9, "storageClass": "fast"},
            "resources": {"requests": {"cpu": 0.1}},
        },
    },
    "rayRedis": {
        "address": "",
        "password": {"value": "q"},
        "embedded": {"enabled": True, "persistence": {"enabled": True}},
    },
    "pools": {
        "decode-large": {
            "role": "decode",
            "replicas": 2,
            "idleTimeoutSeconds": 60,
            "shmSize": 1.5e9,
            "resources": {"requests": {"cpu": 1.5}, "limits": {"memory": 2**34}},
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
            ],
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "labels": {"team": "a"},
            "annotations": {"note": "b"},
            "env": [{"name": "A", "value": "b"}],
            "extraPodSpec": {"hostNetwork": True, "containers": [{"name": "side", "image": "x"}]},
        }
    },
}
"""Everything that is optional, switched on."""


def _validated_pods(rendered: Rendered) -> list[Json]:
    """Pods that KubeRay would make: its schema knows less than Kubernetes' own."""
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        for name, spec in rendered.pod_specs()
    ]


def _is_core(document: Json) -> bool:
    return document["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com")


def test_the_chart_is_of_the_package_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (chart["name"], chart["version"], chart["appVersion"]) == (
        package["name"],
        package["version"],
        package["version"],
    )


@pytest.mark.parametrize("name", COMPLETE)
def test_values_lint_strictly(name: str) -> None:
    report = helm.lint(CHART, COMPLETE[name], strict=True)
    # Severity 1 is information: the chart has no icon.
    assert [each for each in report["messages"] if each["severity"] > 1] == []
    assert report["errors"] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [*COMPLETE, "everything"])
def test_documents_are_strictly_valid(name: str, version: str) -> None:
    rendered = render(GIVEN, EVERYTHING) if name == "everything" else render(COMPLETE[name])
    documents = [document for document in rendered.documents if _is_core(document)]
    assert len(documents) > 10
    for document in documents + _validated_pods(rendered):
        validate(document, version)


@pytest.mark.parametrize("name", [*COMPLETE, "everything"])
def test_the_ray_cluster_is_as_kuberay_wants_it(name: str) -> None:
    path = os.environ.get("BATON_KUBERAY_SCHEMA")
    if not path:
        pytest.skip("set BATON_KUBERAY_SCHEMA to the JSON schema of KubeRay's RayCluster v1")
    rendered = render(GIVEN, EVERYTHING) if name == "everything" else render(COMPLETE[name])
    schema = json.loads(Path(path).read_text())
    jsonschema.Draft202012Validator(schema).validate(rendered.one("RayCluster"))


@pytest.mark.parametrize("name", COMPLETE)
def test_rendering_twice_gives_the_same(name: str) -> None:
    with helm.Chart.load(CHART) as chart:
        first, second = (chart.render(COMPLETE[name], name="chat") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", [*COMPLETE, "everything"])
def test_no_two_documents_have_one_name(name: str) -> None:
    rendered = render(GIVEN, EVERYTHING) if name == "everything" else render(COMPLETE[name])
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered.documents]
    assert len(names) == len(set(names))
    assert all(each["metadata"]["namespace"] == "llm" for each in rendered.documents)


def test_templates_depend_on_values_alone() -> None:
    """Offline tools know no CRDs, so what is rendered must not depend on the cluster's."""
    for template in sorted((CHART / "templates").iterdir()):
        assert ".Capabilities" not in template.read_text(), template.name


@pytest.mark.parametrize("name", COMPLETE)
def test_selectors_select_the_pods_that_are_meant(name: str) -> None:
    rendered = render(COMPLETE[name])
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "StatefulSet")
        for each in rendered.all(kind)
    }
    for service in rendered.all("Service"):
        selector = service["spec"]["selector"]
        selected = [pod for pod, labels in pods.items() if selector.items() <= labels.items()]
        assert selected == [service["metadata"]["name"]]
    for kind in ("Deployment", "StatefulSet"):
        for each in rendered.all(kind):
            labels = pods[each["metadata"]["name"]]
            assert each["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_notes_tell_the_first_request() -> None:
    notes = render().notes
    assert "/v1/chat/completions" in notes
    assert "smollm2-135m-instruct" in notes
    assert "chat-baton-secrets" in notes
    assert "NOT BUILT" not in notes


def test_notes_tell_what_is_not_built() -> None:
    notes = render(COMPLETE["values-h100-rdma.yaml"]).notes
    assert "takes GPUs" in notes[notes.index("NOT BUILT YET") :]


def test_notes_tell_that_gpus_stay_idle() -> None:
    resources = {"limits": {"nvidia.com/gpu": 1}}
    notes = render(GIVEN, {"pools": {"decode": {"resources": resources}}}).notes
    assert "pool decode takes GPUs and leaves them idle" in notes


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"secrets": {"apiKey": {"enabled": False, "value": ""}}}, "there is no API key"),
        ({"ray": {"auth": {"enabled": False}}}, "token authentication is off"),
        (
            {"ray": {"gcsFaultTolerance": {"enabled": False}}},
            "GCS fault tolerance is off",
        ),
        ({"ray": {"autoscaling": {"enabled": True}}}, "--force-conflicts"),
    ],
)
def test_notes_warn(values: Json, words: str) -> None:
    assert words in render(GIVEN, values).notes
    assert words not in render().notes
