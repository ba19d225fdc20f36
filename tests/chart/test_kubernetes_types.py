"""What goes into a pod, or into the HPA, as it is, is checked by Kubernetes' own types."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import helm_python as helm
import pytest
from support.chart import CHART, GIVEN, render
from support.scripts import load

Json = dict[str, Any]

PARTS = ("gateway", "controller", "ray.head", "poolDefaults", "pools.decode")
"""Where values of a pod are."""


def _at(path: str, values: Json) -> Json:
    for key in reversed(path.split(".")):
        values = {key: values}
    return values


SPREAD: Json = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}

OF_A_POD: dict[str, tuple[Json, str]] = {
    "probe": ({"livenessProbe": {"periodSecond": 5}}, "'periodSecond' not allowed"),
    "probe's question": ({"startupProbe": {"httpGet": {"pfad": "/"}}}, "'pfad' not allowed"),
    "probe without a port": ({"readinessProbe": {"tcpSocket": {}}}, "missing property 'port'"),
    "affinity": ({"affinity": {"nodeAfinity": {}}}, "'nodeAfinity' not allowed"),
    "toleration": ({"tolerations": [{"kee": "a"}]}, "'kee' not allowed"),
    "toleration's operator": ({"tolerations": [{"operator": "Exist"}]}, "must be one of '', 'Ex"),
    "no toleration": ({"tolerations": [None]}, "got null, want object"),
    "spread without its rule": (
        {"topologySpreadConstraints": [{k: SPREAD[k] for k in ("maxSkew", "topologyKey")}]},
        "missing property 'whenUnsatisfiable'",
    ),
    "spread of another rule": (
        {"topologySpreadConstraints": [{**SPREAD, "whenUnsatisfiable": "Never"}]},
        "must be one of 'DoNotSchedule', 'ScheduleAnyway'",
    ),
    "pod": ({"extraPodSpec": {"nodeSelecter": {}}}, "'nodeSelecter' not allowed"),
    "pod's container": (
        {"extraPodSpec": {"containers": [{"name": "side", "imag": "x"}]}},
        "'imag' not allowed",
    ),
    "pod's volume": (
        {"extraPodSpec": {"volumes": [{"name": "more", "emptydir": {}}]}},
        "'emptydir' not allowed",
    ),
    "variable's source": (
        {"env": [{"name": "A", "valueFrom": {"secretRef": {"name": "s"}}}]},
        "'secretRef' not allowed",
    ),
    "resource's claim": ({"resources": {"claims": [{"nam": "gpu"}]}}, "'nam' not allowed"),
}

OTHERS: dict[str, tuple[Json, str]] = {
    "cache": ({"cacheVolume": {"emptydir": {}}}, "'emptydir' not allowed"),
    "two caches": ({"cacheVolume": {"emptyDir": {}, "hostPath": {"path": "/"}}}, "maxProperties"),
    "cache's name": ({"cacheVolume": {"name": "cache"}}, "'name' not allowed"),
    "container's rights": ({"securityContext": {"privilegd": True}}, "'privilegd' not allowed"),
    "pod's rights": ({"podSecurityContext": {"fsGrup": 1}}, "'fsGrup' not allowed"),
    "seccomp profile": (
        {"podSecurityContext": {"seccompProfile": {"type": "Default"}}},
        "must be one of 'Localhost', 'RuntimeDefault', 'Unconfined'",
    ),
    "metric": (_at("gateway.autoscaling", {"metrics": [{"tipe": "Pods"}]}), "'tipe' not allowed"),
    "HPA's behaviour": (
        _at("gateway.autoscaling.behavior", {"scaleDwn": {}}),
        "'scaleDwn' not allowed",
    ),
    "peer's labels": (
        _at("networkPolicy", {"clients": [{"podSelector": {"matchLabel": {}}}]}),
        "'matchLabel' not allowed",
    ),
    "peer's addresses": (
        _at("networkPolicy.redis", {"to": [{"ipBlock": {"except": []}}]}),
        "missing property 'cidr'",
    ),
}


def _refusal(values: Json) -> str:
    with pytest.raises(helm.HelmValuesError) as refused:
        render(GIVEN, values)
    return str(refused.value)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OF_A_POD)
def test_a_pods_values_are_kubernetes_own(name: str, part: str) -> None:
    values, said = OF_A_POD[name]
    assert said in _refusal(_at(part, values))


@pytest.mark.parametrize("name", OTHERS)
def test_other_values_are_kubernetes_own(name: str) -> None:
    values, said = OTHERS[name]
    assert said in _refusal(values)


GOOD: Json = {
    "livenessProbe": {"grpc": {"port": 7100}, "periodSeconds": 5},
    "startupProbe": {"httpGet": {"port": "http", "scheme": "HTTPS"}},
    "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoSchedule"}, {"key": "b"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]
            }
        }
    },
    "topologySpreadConstraints": [{**SPREAD, "labelSelector": {"matchLabels": {"a": "b"}}}],
    "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}],
    "extraPodSpec": {
        "securityContext": {"fsGroup": 7},
        "containers": [{"name": "side", "image": "x", "resources": {"limits": {"cpu": 0.5}}}],
        "volumes": [{"name": "more", "emptyDir": {"sizeLimit": "1Gi"}}],
        "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
    },
}


@pytest.mark.parametrize("part", PARTS)
def test_what_kubernetes_takes_is_taken(part: str) -> None:
    assert render(GIVEN, _at(part, GOOD)).documents


def test_values_that_kubernetes_says_in_words_are_as_it_says() -> None:
    """Its schema has them in a field's description, but for these three."""
    script = load("chart_schema")
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"v{script.KUBERNETES}.0-local-strict" / "_definitions.json").read_text()
    types = {name.rpartition(".")[2]: each for name, each in json.loads(text)["$defs"].items()}
    unsaid = set()
    for field, values in script._ONE_OF.items():
        name, _, key = field.partition(".")
        said = types[name]["properties"][key]["description"]
        if not all(each in said for each in values):
            unsaid.add(field)
    assert unsaid == {
        "HPAScalingPolicy.type",
        "HPAScalingRules.selectPolicy",
        "HTTPGetAction.scheme",
    }


def test_the_schema_stays_of_a_size_that_helm_reads_in_no_time() -> None:
    assert (CHART / "values.schema.json").stat().st_size < 300_000
