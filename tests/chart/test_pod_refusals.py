"""Pods that Kubernetes or KubeRay would refuse are refused when the chart is rendered."""

from __future__ import annotations

import re
from typing import Any

import helm_python as helm
import pytest
from support.chart import GIVEN, refusal, render

from baton.config import parse_config

Json = dict[str, Any]


def _pool(**settings: Any) -> Json:
    return {"pools": {"decode": settings}}


def _extra(**entries: Any) -> Json:
    return {"gateway": {"extraPodSpec": entries}}


AS_ROOT = {"runAsNonRoot": False, "runAsUser": 0}
GPUS = {"limits": {"nvidia.com/gpu": 2}}

MISFITS: dict[str, tuple[Json, str]] = {
    "a variable of the chart's in a pool": (
        _pool(env=[{"name": "BATON_ADVERTISE_HOST", "value": "x"}]),
        "pools.decode.env has BATON_ADVERTISE_HOST, which the chart sets",
    ),
    "UCX over TCP by a variable": (
        {
            "config": {"kv_transfer": {"transport": "nixl"}},
            "poolDefaults": {
                "rdma": {"enabled": True, "resourceName": "rdma/x"},
                "env": [{"name": "UCX_TLS", "value": "tcp"}],
            },
        },
        "env has UCX_TLS, which the chart sets",
    ),
    "a variable of the chart's in gateways": (
        {"gateway": {"env": [{"name": "BATON_SECRET", "value": "x"}]}},
        "gateway.env has BATON_SECRET, which the chart sets",
    ),
    "a variable twice": (
        {"controller": {"env": [{"name": "A", "value": "x"}, {"name": "A", "value": "y"}]}},
        "controller.env has A, which .* is there twice",
    ),
    "a container named like the chart's": (
        _extra(containers=[{"name": "gateway", "image": "x"}]),
        "gateway.extraPodSpec has a container named gateway",
    ),
    "a container named like KubeRay's": (
        _pool(extraPodSpec={"containers": [{"name": "wait-gcs-ready", "image": "x"}]}),
        "pools.decode.extraPodSpec has a container named wait-gcs-ready",
    ),
    "a volume named like the chart's": (
        _extra(volumes=[{"name": "tmp", "emptyDir": {}}]),
        "gateway.extraPodSpec has a volume named tmp",
    ),
    "two volumes at one place": (
        {"paths": {"run": "/tmp/"}},
        "the volumes tmp and run are both mounted at /tmp; choose another path",
    ),
    "a cache inside of the configuration": (
        {"paths": {"cache": "/etc/baton/cache"}},
        "gateway: the volume cache at /etc/baton/cache lies inside of the volume config at",
    ),
    "sockets inside of the model": (
        {
            "paths": {"run": "/models//run/"},
            "model": {"source": "pvc", "pvc": {"claimName": "c"}},
        },
        "pools.decode: the volume run at /models//run/ lies inside of the volume model at /models",
    ),
    "root that may not be": (
        {"podSecurityContext": {"runAsUser": 0}},
        "podSecurityContext and securityContext: runAsUser is 0 and runAsNonRoot is true",
    ),
    "a container's root that its pod may not have": (
        {"securityContext": {"runAsUser": 0}},
        "so the container of every pod would never start; set runAsNonRoot: false",
    ),
    "root of one pool that may not be": (
        _pool(extraPodSpec={"securityContext": {"runAsUser": 0}}),
        "pools.decode.extraPodSpec: runAsUser is 0 .* the container ray-worker would never start",
    ),
    "root of another container that may not be": (
        _extra(containers=[{"name": "side", "image": "x", "securityContext": {"runAsUser": 0}}]),
        "gateway.extraPodSpec: runAsUser is 0 .* the container side would never start",
    ),
    "a request over its limit": (
        {"poolDefaults": {"resources": {"limits": {"cpu": "2"}}}},
        r"resources: requests.cpu \(4\) is over limits.cpu \(2\); lower the request",
    ),
    "a request over its limit in another unit": (
        {"gateway": {"resources": {"limits": {"cpu": "500m"}}}},
        r"gateway.resources: requests.cpu \(1\) is over limits.cpu \(500m\)",
    ),
    "a head's request over its limit": (
        {"ray": {"head": {"resources": {"limits": {"memory": "1G"}}}}},
        "ray.head.resources: requests.memory",
    ),
    "an autoscaler's request over its limit": (
        {"ray": {"autoscaling": {"resources": {"limits": {"memory": 1000000}}}}},
        "ray.autoscaling.resources: requests.memory",
    ),
    "GPUs asked for without a limit": (
        _pool(resources={"requests": {"nvidia.com/gpu": 1}}),
        "pools.decode.resources.requests has nvidia.com/gpu without a limit",
    ),
    "fewer GPUs asked for than given": (
        _pool(resources={"requests": {"nvidia.com/gpu": 1}, **GPUS}),
        "devices are not shared; set the limit alone",
    ),
    "half a GPU": (
        _pool(resources={"limits": {"nvidia.com/gpu": "1.5"}}),
        "has 1.5 of nvidia.com/gpu: devices are given whole",
    ),
    "memory for less than the cache": (
        {"config": {"engine": {"kv_cache_bytes": 64 * 2**30}}},
        r"limits.memory is 16Gi, but shmSize \(2Gi\) and engine.kv_cache_bytes \(68719476736\)",
    ),
    "memory for less than one pool's cache": (
        _pool(engine={"kv_cache_bytes": 15 * 2**30}),
        "pools.decode.resources.limits.memory is 16Gi",
    ),
    "shared memory over the pod's": (_pool(shmSize="17Gi"), r"shmSize \(17Gi\) and"),
    "HPA without a request for CPUs": (
        {
            "gateway": {
                "autoscaling": {"enabled": True},
                "resources": {"requests": {"cpu": None}},
            }
        },
        "gateway.autoscaling goes by the share of gateway.resources.requests.cpu",
    ),
    "an idle time that the old autoscaler does not know": (
        {
            "ray": {"autoscaling": {"enabled": True, "version": "v1"}},
            **_pool(idleTimeoutSeconds=60),
        },
        "pools.decode.idleTimeoutSeconds is for version v2 of the autoscaler",
    ),
    "labels of Ray's for a pool": (
        _pool(rayStartParams={"labels": "a=b"}),
        "pools.decode.rayStartParams.labels is refused by KubeRay",
    ),
    "labels of Ray's for the head": (
        {"ray": {"head": {"rayStartParams": {"labels": "a=b"}}}},
        "ray.head.rayStartParams.labels is refused by KubeRay",
    ),
    "a password for everybody to read in the head's parameters": (
        {"ray": {"head": {"rayStartParams": {"redis-password": "x"}}}},
        "redis-password is refused by KubeRay; set rayRedis.password",
    ),
    "a password of Ray's Redis by a variable": (
        {"ray": {"head": {"env": [{"name": "REDIS_PASSWORD", "value": "x"}]}}},
        "ray.head.env has REDIS_PASSWORD, which is refused by KubeRay",
    ),
    "a port of the moment for a Ray node": (
        _pool(rayStartParams={"node-manager-port": "0"}),
        "pools.decode: node-manager-port is 0, which is no fixed port",
    ),
    "a port past the last one for a Ray node": (
        _pool(rayStartParams={"metrics-export-port": "70000"}),
        "pools.decode: metrics-export-port is 70000, which is no fixed port",
    ),
    "no port for Ray's head": (
        {"ray": {"head": {"rayStartParams": {"port": "abc"}}}},
        "ray.ports: port is abc, which is no fixed port; choose one from 1 to 65535",
    ),
    "a secret that workers are told elsewise": (
        _pool(env=[{"name": "BATON_SECRET", "value": "x"}]),
        "pools.decode.env has BATON_SECRET, which the chart sets .*, from secrets.cluster",
    ),
    "a Redis that workers are told elsewise": (
        {"poolDefaults": {"env": [{"name": "REDIS_URL", "value": "redis://x"}]}},
        "env has REDIS_URL, which the chart sets",
    ),
    "a key past the chart": (
        {
            "secrets": {"apiKey": {"enabled": False}},
            "gateway": {"env": [{"name": "BATON_API_KEY", "value": "x"}]},
        },
        "gateway.env has BATON_API_KEY, which the chart sets .*, from secrets.apiKey",
    ),
    "another Ray for the controller": (
        {"controller": {"env": [{"name": "RAY_ADDRESS", "value": "x"}]}},
        "controller.env has RAY_ADDRESS, which the chart sets .*, from ray.clientAddress",
    ),
    "another token for Ray's head": (
        {"ray": {"head": {"env": [{"name": "RAY_AUTH_TOKEN", "value": "x"}]}}},
        "ray.head.env has RAY_AUTH_TOKEN, which the chart sets .*, from secrets.rayToken",
    ),
    "a name that KubeRay gives": (
        _pool(env=[{"name": "RAY_NODE_TYPE_NAME", "value": "x"}]),
        "pools.decode.env has RAY_NODE_TYPE_NAME, by which KubeRay tells",
    ),
    "a variable with two values": (
        _pool(
            env=[
                {
                    "name": "A",
                    "value": "x",
                    "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}},
                }
            ]
        ),
        "pools.decode.env has a value and a valueFrom for A; choose one",
    ),
    "a probe that asks two things": (
        _pool(livenessProbe={"exec": {"command": ["true"]}, "httpGet": {"port": 1}}),
        "pools.decode.livenessProbe has exec and httpGet: a probe asks one thing",
    ),
    "a probe that asks a command of no words": (
        {"controller": {"livenessProbe": {"exec": {}}}},
        "controller.livenessProbe.exec has no command",
    ),
    "a probe without a period": (
        {"gateway": {"readinessProbe": {"periodSeconds": 0}}},
        "gateway.readinessProbe.periodSeconds is 0; use 1 or more",
    ),
    "a probe that begins before its pod": (
        {"poolDefaults": {"startupProbe": {"initialDelaySeconds": -1}}},
        "startupProbe.initialDelaySeconds is -1; use 0 or more",
    ),
    "a probe that has to succeed twice to live": (
        {"ray": {"head": {"livenessProbe": {"successThreshold": 2}}}},
        "ray.head.livenessProbe.successThreshold is 2: of a livenessProbe Kubernetes takes 1",
    ),
    "a probe that has to succeed twice to start": (
        _pool(startupProbe={"successThreshold": 3}),
        "pools.decode.startupProbe.successThreshold is 3",
    ),
    "a probe that would end a container that is not ready": (
        {"gateway": {"readinessProbe": {"terminationGracePeriodSeconds": 5}}},
        "gateway.readinessProbe.terminationGracePeriodSeconds: a readiness probe ends no",
    ),
    "a Ray without tokens": (
        {"ray": {"version": "2.51.1"}},
        "ray.version is 2.51.1, but token authentication came with 2.52.0",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_refused_in_a_sentence(name: str) -> None:
    values, sentence = MISFITS[name]
    assert re.search(sentence, refusal(values))


@pytest.mark.parametrize(
    "over",
    [
        {"podSecurityContext": {"runAsUser": 0, "runAsNonRoot": False}},
        {"podSecurityContext": {"runAsUser": 0}, "securityContext": {"runAsUser": 10001}},
        {"podSecurityContext": {"runAsUser": None}},
        {"poolDefaults": {"extraPodSpec": {"securityContext": AS_ROOT}}},
    ],
)
def test_a_user_that_the_kubelet_starts_is_taken(over: Json) -> None:
    assert render(GIVEN, over).documents


def test_a_volume_may_lie_in_one_that_can_be_written_to() -> None:
    rendered = render(GIVEN, {"paths": {"run": "/var/cache/baton/run", "config": "/tmp/baton"}})
    mounts = {each["name"]: each["mountPath"] for each in rendered.worker()["volumeMounts"]}
    assert mounts["run"] == "/var/cache/baton/run"


def test_resources_that_fit_are_taken() -> None:
    """Each at its bound, and in different units."""
    cache = parse_config({}).engine.kv_cache_bytes
    over: Json = {
        "gateway": {"resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "1000m"}}},
        "pools": {
            "decode": {
                "shmSize": "512Mi",
                "resources": {
                    "requests": {"nvidia.com/gpu": 2},
                    "limits": {"memory": cache + 512 * 2**20, "nvidia.com/gpu": "2"},
                },
            }
        },
    }
    assert render(GIVEN, over)
    over["pools"]["decode"]["resources"]["limits"]["memory"] -= 1
    with pytest.raises(helm.HelmRenderError, match="the model comes on top"):
        render(GIVEN, over)


def test_probes_that_kubernetes_takes_are_taken() -> None:
    """Each at its bound."""
    least = {"initialDelaySeconds": 0, "timeoutSeconds": 1, "periodSeconds": 1}
    over: Json = {
        "gateway": {"readinessProbe": {**least, "successThreshold": 3, "failureThreshold": 1}},
        "controller": {"livenessProbe": {**least, "successThreshold": 1}},
        "pools": {"decode": {"startupProbe": {"exec": {"command": ["true"]}}}},
    }
    rendered = render(GIVEN, over)
    assert rendered.worker()["startupProbe"]["exec"] == {"command": ["true"]}
    assert "tcpSocket" not in rendered.worker()["startupProbe"]
