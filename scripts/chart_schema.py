"""Writes Baton's settings and Kubernetes' types into charts/baton/values.schema.json.

    .venv/bin/python scripts/chart_schema.py [--check]

So Helm refuses an unknown setting before anything is installed, and not the pods afterwards.
Of the schema's ``definitions``, those of Baton's settings are generated: they are named like the
classes of baton/config.py and begin with a capital; all others are written by hand. All of its
``$defs`` are generated, from the JSON schema of Kubernetes that kubernetes-validate brings: what
a value is that goes into a pod, or into the HPA, as it is. With --check the file stays as it is:
exit status 1 if it differs.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from baton.config import BatonConfig

Json = dict[str, Any]

SCHEMA = Path(__file__).resolve().parent.parent / "charts" / "baton" / "values.schema.json"

_LEFT_TO_THE_TEMPLATES = ("model", "pools")
"""Refused under `config` in a sentence of their own, which a schema cannot say."""

KUBERNETES = "1.37"
"""Whose types: what an older cluster does not know yet it says by itself."""

_TYPES = (
    *(
        f"io.k8s.api.core.v1.{name}"
        for name in (
            "Affinity",
            "EnvVarSource",
            "PodSecurityContext",
            "PodSpec",
            "Probe",
            "ResourceClaim",
            "SecurityContext",
            "Toleration",
            "TopologySpreadConstraint",
            "Volume",
        )
    ),
    "io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerBehavior",
    "io.k8s.api.autoscaling.v2.MetricSpec",
    "io.k8s.api.networking.v1.NetworkPolicyPeer",
)

_ONE_OF = {
    "Container.imagePullPolicy": ["Always", "Never", "IfNotPresent"],
    "ContainerPort.protocol": ["TCP", "UDP", "SCTP"],
    "HPAScalingPolicy.type": ["Pods", "Percent"],
    "HPAScalingRules.selectPolicy": ["Max", "Min", "Disabled"],
    "HTTPGetAction.scheme": ["HTTP", "HTTPS"],
    "LabelSelectorRequirement.operator": ["In", "NotIn", "Exists", "DoesNotExist"],
    "MetricSpec.type": ["ContainerResource", "External", "Object", "Pods", "Resource"],
    "MetricTarget.type": ["Utilization", "Value", "AverageValue"],
    "NodeSelectorRequirement.operator": ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"],
    "PodSpec.dnsPolicy": ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"],
    "PodSpec.preemptionPolicy": ["Never", "PreemptLowerPriority"],
    "SeccompProfile.type": ["Localhost", "RuntimeDefault", "Unconfined"],
    "Toleration.effect": ["", "NoSchedule", "PreferNoSchedule", "NoExecute"],
    "Toleration.operator": ["", "Exists", "Equal", "Lt", "Gt"],
    "TopologySpreadConstraint.nodeAffinityPolicy": ["Honor", "Ignore"],
    "TopologySpreadConstraint.nodeTaintsPolicy": ["Honor", "Ignore"],
    "TopologySpreadConstraint.whenUnsatisfiable": ["DoNotSchedule", "ScheduleAnyway"],
}
"""What Kubernetes' schema says in words alone: a field's only values."""


def _bare(schema: Any) -> Any:
    """Without titles, and without defaults: the chart has some of its own."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: _bare(each) for name, each in value.items()}
        elif key == "description":
            found[key] = " ".join(value.split())
        elif key not in ("title", "default"):
            found[key] = _bare(value)
    return found


def definitions() -> Json:
    """Of every section of the configuration, and of the whole, by the class's name."""
    root = BatonConfig.model_json_schema(ref_template="#/definitions/{model}")
    sections = root.pop("$defs")
    for key in _LEFT_TO_THE_TEMPLATES:
        root["properties"][key] = {}
    del sections["PoolConfig"]
    found: Json = _bare({**sections, BatonConfig.__name__: root})
    return {name: found[name] for name in sorted(found)}


def _without_null(schema: Any) -> Any:
    """As it is, but for descriptions, formats, Kubernetes' notes to itself and null: that takes a
    key of the values away, and none is to reach a pod."""
    if isinstance(schema, list):
        return [_without_null(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: _without_null(each) for name, each in value.items()}
        elif key == "type":
            (found[key],) = {value} if isinstance(value, str) else set(value) - {"null"}
        elif key == "$ref":
            found[key] = f"#/$defs/{value.rpartition('.')[2]}"
        elif key not in ("description", "format", "default") and not key.startswith("x-"):
            found[key] = _without_null(value)
    return found


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)


def kubernetes_types() -> Json:
    """Those that values are made of, and what these are made of, by their names without the API's
    group, closed to unknown keys."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema"
    text = (folder / f"v{KUBERNETES}.0-local-strict" / "_definitions.json").read_text()
    everything: Json = json.loads(text)["$defs"]
    found: Json = {}
    missing = list(_TYPES)
    while missing:
        group, _, name = missing.pop().rpartition(".")
        if name not in found:
            found[name] = _without_null(everything[f"{group}.{name}"])
            missing += _references(everything[f"{group}.{name}"])
    for field, values in _ONE_OF.items():
        name, _, key = field.partition(".")
        found[name]["properties"][key]["enum"] = values
    del found["PodSpec"]["required"]  # the chart's own containers are there already
    source = found["VolumeSource"] = copy.deepcopy(found["Volume"])
    del source["required"], source["properties"]["name"]  # the chart names it
    return {name: found[name] for name in sorted(found)}


def main() -> None:
    old = SCHEMA.read_text()
    schema = json.loads(old)
    own = {name: each for name, each in schema["definitions"].items() if not name[0].isupper()}
    schema["definitions"] = own | definitions()
    schema["$defs"] = kubernetes_types()
    new = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    if sys.argv[1:] != ["--check"]:
        SCHEMA.write_text(new)
    elif new != old:
        sys.exit(f"{SCHEMA.name} is out of date; run scripts/chart_schema.py")


if __name__ == "__main__":
    main()
