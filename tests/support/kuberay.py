"""What the KubeRay operator makes of a RayCluster: its pods, as version 1.7 builds them.

After ray-operator/controllers/ray/common/pod.go (Apache-2.0): ``setMissingRayStartParams``,
``generateRayStartCommand``, ``convertParamMap``, ``setContainerEnvVars``,
``configureGCSFaultTolerance``, ``SetContainerTokenAuthEnvVars``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_HEAD = "headgroup"
_TAKES_A_BOOLEAN = ("log-color", "include-dashboard", "include-log-monitor")
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: ``500m``, ``16Gi``, ``2``."""
    text = str(text)
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    if text.endswith("m"):
        return float(text.removesuffix("m")) / 1000
    return float(text)


def flags(parameters: Mapping[str, str]) -> str:
    """``rayStartParams`` as flags, unquoted: a shell reads them."""
    words = []
    for name, value in sorted(parameters.items()):
        if value.lower() in ("true", "false") and name not in _TAKES_A_BOOLEAN:
            if value.lower() == "true":
                words.append(f"--{name}")
        else:
            words.append(f"--{name}={value}")
    return " ".join(words)


def head_pod(cluster: Mapping[str, Any]) -> dict[str, Any]:
    """The head's pod template with what KubeRay adds to its first container."""
    group = copy.deepcopy(cluster["spec"]["headGroupSpec"])
    parameters = group["rayStartParams"]
    environment: list[dict[str, Any]] = []
    if options := cluster["spec"].get("gcsFaultToleranceOptions"):
        namespace = options.get("externalStorageNamespace", "the-clusters-uid")
        environment.append({"name": "RAY_external_storage_namespace", "value": namespace})
        environment.append({"name": "RAY_REDIS_ADDRESS", "value": options["redisAddress"]})
        for key, flag, variable in (
            ("redisUsername", "redis-username", "REDIS_USERNAME"),
            ("redisPassword", "redis-password", "REDIS_PASSWORD"),
        ):
            if key in options:
                parameters[flag] = f"${variable}"  # for the shell
                environment.append({"name": variable, **options[key]})
    parameters.setdefault("dashboard-host", "0.0.0.0")
    port = parameters.get("port", "6379")
    return _pod(cluster, group, _HEAD, f"127.0.0.1:{port}", port, environment)


def worker_pod(cluster: Mapping[str, Any], group_name: str, *, head_host: str) -> dict[str, Any]:
    """A worker group's pod template. ``head_host`` stands for the head's Service."""
    (found,) = [x for x in cluster["spec"]["workerGroupSpecs"] if x["groupName"] == group_name]
    group = copy.deepcopy(found)
    port = cluster["spec"]["headGroupSpec"]["rayStartParams"].get("port", "6379")
    address = f"{head_host}:{port}"
    group["rayStartParams"].setdefault("address", address)
    environment: list[dict[str, Any]] = [
        {"name": "FQ_RAY_IP", "value": head_host},
        {"name": "RAY_IP", "value": head_host},
    ]
    if cluster["spec"].get("gcsFaultToleranceOptions"):
        timeout = {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"}
        environment.append(timeout)
    pod = _pod(cluster, group, group_name, address, port, environment)
    container = pod["spec"]["containers"][0]
    waits = {
        "name": "wait-gcs-ready",
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"until ray health-check --address {address} > /dev/null 2>&1; do sleep 1; done"],
        "env": container["env"],
        "volumeMounts": container.get("volumeMounts", []),
    }
    pod["spec"].setdefault("initContainers", []).append(waits)
    return pod


def _pod(
    cluster: Mapping[str, Any],
    group: dict[str, Any],
    group_name: str,
    address: str,
    port: str,
    environment: list[dict[str, Any]],
) -> dict[str, Any]:
    pod: dict[str, Any] = group["template"]
    name = cluster["metadata"]["name"]
    labels = pod.setdefault("metadata", {}).setdefault("labels", {})
    labels |= {"ray.io/cluster": name, "ray.io/group": group_name}
    container = pod["spec"]["containers"][0]
    parameters = group["rayStartParams"]
    assert all(isinstance(value, str) for value in parameters.values()), parameters
    parameters.setdefault("metrics-export-port", "8080")
    parameters.setdefault("dashboard-agent-listen-port", "52365")
    parameters["block"] = "true"
    _add_resources(parameters, container.get("resources", {}))
    start = f"ray start {'--head ' if group_name == _HEAD else ''}{flags(parameters)}"
    assert not container.get("command"), "KubeRay would put this before `ray start`"
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]
    _add_environment(container, [*environment, *_own(cluster, address, port, start)])
    return pod


def _own(cluster: Mapping[str, Any], address: str, port: str, start: str) -> list[dict[str, Any]]:
    variables: list[dict[str, Any]] = []
    for variable, path in (
        ("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        ("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        ("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        ("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
    ):
        variables.append({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    for variable, value in (
        ("KUBERAY_GEN_RAY_START_CMD", start),
        ("RAY_PORT", port),
        ("RAY_ADDRESS", address),
        ("RAY_USAGE_STATS_KUBERAY_IN_USE", "1"),
        ("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1"),
    ):
        variables.append({"name": variable, "value": value})
    if (auth := cluster["spec"].get("authOptions", {})).get("mode") == "token":
        secret = auth.get("secretName") or cluster["metadata"]["name"]
        reference = {"secretKeyRef": {"name": secret, "key": "auth_token"}}
        variables.append({"name": "RAY_AUTH_MODE", "value": "token"})
        variables.append({"name": "RAY_AUTH_TOKEN", "valueFrom": reference})
    return variables


def _add_environment(container: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """What the container sets itself stays."""
    own = container.setdefault("env", [])
    names = {entry["name"] for entry in own}
    own += [entry for entry in added if entry["name"] not in names]


def _add_resources(parameters: dict[str, str], resources: Mapping[str, Any]) -> None:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    if cpu := limits.get("cpu") or requests.get("cpu"):
        parameters.setdefault("num-cpus", str(-int(-quantity(cpu) // 1)))
    if memory := limits.get("memory"):
        parameters.setdefault("memory", str(int(quantity(memory))))
    for key, value in limits.items():
        if key.endswith("gpu"):
            parameters.setdefault("num-gpus", str(int(quantity(value))))
