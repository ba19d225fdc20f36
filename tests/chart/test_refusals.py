"""What does not fit is refused when the chart is rendered, in a sentence."""

from __future__ import annotations

import re
from typing import Any

import helm_python as helm
import pytest
from support.chart import COMPLETE, GIVEN, merged, render

Json = dict[str, Any]


def _pool(**settings: Any) -> Json:
    return {"pools": {"decode": settings}}


GPUS = {"limits": {"nvidia.com/gpu": 2}}
REDIS_AWAY: Json = {"redis": {"url": ""}}
RAY_REDIS_AWAY: Json = {"rayRedis": {"address": ""}}

MISFITS: dict[str, tuple[Json, str]] = {
    "GPUs that the ranks cannot share out": (
        _pool(tensorParallelSize=3, resources=GPUS),
        "pools.decode has 2 GPUs .* is 3; give it that many, or none at all",
    ),
    "more ranks than the embedded model has heads for": (
        _pool(tensorParallelSize=2),
        "pools.decode: tensorParallelSize 2 .* valid: tensorParallelSize 1, 3, 9 with",
    ),
    "experts of a model that has none": (
        _pool(expertParallelSize=3),
        "expertParallelSize 3 does not fit the embedded model, .* and no experts",
    ),
    "too few GPUs for tensor times expert": (
        _pool(tensorParallelSize=2, expertParallelSize=2, resources=GPUS),
        "has 2 GPUs .* is 4",
    ),
    "GPUs of another name do not count": (
        {"gpuResourceName": "amd.com/gpu", **_pool(tensorParallelSize=2, resources=GPUS)},
        r"has 0 GPUs in resources.limits \(amd.com/gpu\)",
    ),
    "RDMA without a resource": (
        {"config": {"kv_transfer": {"transport": "nixl"}}, **_pool(rdma={"enabled": True})},
        "name the device's resource in rdma.resourceName",
    ),
    "RDMA's transport on a pool without RDMA": (
        {"config": {"kv_transfer": {"transport": "nixl"}}},
        "has no RDMA, and UCX would take TCP",
    ),
    "a pool's name that Kubernetes would refuse": (
        {"pools": {"decode-": {"role": "decode"}}},
        "is no name of a pool",
    ),
    "a Redis on a port that the policy closes": (
        {"redis": {"url": "redis://:p@redis.example:6380/0"}},
        "redis.url is on port 6380, but networkPolicy.redis.port is 6379; set it to 6380",
    ),
    "a Redis of Ray's on a port that the policy closes": (
        {"rayRedis": {"address": "redis://ray-redis.example:6390"}},
        "rayRedis.address is on port 6390",
    ),
    "a Redis past the last port": (
        {"redis": {"url": "redis://:p@r:70000/0"}, "networkPolicy": {"enabled": False}},
        "redis.url is on port 70000, which is none",
    ),
    "one Redis for both": (
        {
            "redis": {"url": "redis://:p@redis.example:6379/0"},
            "rayRedis": {"address": "redis://redis.example:6379"},
        },
        "are one Redis",
    ),
    "one Redis for both, by two names": (
        {
            "redis": {"url": "redis://:p@Redis.llm.svc.cluster.local/0"},
            "rayRedis": {"address": "redis://redis:6379"},
        },
        "are one Redis",
    ),
    "Baton's embedded Redis for Ray": (
        {
            "redis": {"url": "", "embedded": {"enabled": True, "password": {"value": "p"}}},
            "rayRedis": {"address": "redis://chat-baton-redis.llm.svc:6379"},
        },
        "are one Redis",
    ),
    "Ray's embedded Redis for Baton": (
        {
            "redis": {"url": "redis://:q@chat-baton-ray-redis:6379/0"},
            "rayRedis": {
                "address": "",
                "password": {"value": "q"},
                "embedded": {"enabled": True},
            },
        },
        "are one Redis",
    ),
    "one key of one Secret for both": (
        {
            "redis": {"url": "", "existingSecret": "s", "key": "k"},
            "rayRedis": {"password": {"existingSecret": "s", "key": "k"}},
        },
        "are both the key k of the Secret s",
    ),
    "a Redis in every pod": (
        {"redis": {"url": "redis://:p@localhost:6379/0"}},
        "redis.url is on localhost:6379, which is another place in every pod",
    ),
    "a Redis of Ray's in every pod": (
        {"rayRedis": {"address": "redis://127.0.0.1:6379"}},
        "rayRedis.address is on 127.0.0.1:6379",
    ),
    "another protocol": ({"redis": {"url": "http://redis"}}, "redis.url is no URL of a Redis"),
    "a socket that pods do not share": (
        {"redis": {"url": "unix:///run/redis.sock"}},
        "redis.url is no URL of a Redis",
    ),
    "a Redis without a host": ({"redis": {"url": "redis:///0"}}, "redis.url is no URL"),
    "another protocol of Ray's": (
        {"rayRedis": {"address": "http://redis"}},
        "rayRedis.address is no address that Ray reads",
    ),
    "a password of two words for Ray": (
        {"rayRedis": {"password": {"value": "two words"}}},
        "rayRedis.password.value becomes a word",
    ),
    "a password in quotes for Ray": (
        {"rayRedis": {"password": {"value": "'quoted'"}}},
        "rayRedis.password.value becomes a word",
    ),
    "a password for everybody to read": (
        {"rayRedis": {"address": "redis://:p@ray-redis.example:6379"}},
        "holds a password",
    ),
    "RDMA with none of it": (
        _pool(rdma={"enabled": True, "resourceName": "r", "count": 0}),
        "with a count of 1 or more",
    ),
    "RDMA that the transport cannot use": (
        _pool(rdma={"enabled": True, "resourceName": "r", "count": 1}),
        '"auto", which cannot use it',
    ),
    "RDMA over gloo": (
        {
            "config": {"kv_transfer": {"transport": "gloo"}},
            **_pool(rdma={"enabled": True, "resourceName": "r", "count": 1}),
        },
        '"gloo", which cannot use it',
    ),
    "shared memory between pods": (
        {"config": {"kv_transfer": {"transport": "shared_memory"}}},
        "workers of pools.prefill are in other pods",
    ),
    "no decode pool": ({"pools": {"decode": None}}, "no pool of role decode has replicas"),
    "an empty decode pool": (_pool(replicas=0), "no pool of role decode has replicas"),
    "no role": ({"pools": {"large": {}}}, "set pools.large.role to prefill or decode"),
    "one pool twice": (
        {"pools": {"Decode": {"role": "decode"}}},
        'pools.Decode and pools.decode are both the pool "decode"',
    ),
    "one pool twice, spelled otherwise": (
        {"pools": {"long_ctx": {"role": "decode"}, "long-ctx": {"role": "decode"}}},
        'are both the pool "long-ctx"',
    ),
    "a name that is none": ({"pools": {"7b": {"role": "decode"}}}, "is no name of a pool"),
    "over the maximum": (_pool(replicas=9), r"replicas \(9\) is over maxReplicas \(8\)"),
    "below the minimum": (_pool(minReplicas=2), r"replicas \(1\) is below minReplicas \(2\)"),
    "drain set twice": (_pool(worker={"drain_s": 3}), "worker.drain_s is set by drainSeconds"),
    "drain set twice for all": (
        {"config": {"worker": {"drain_s": 600}}},
        "config.worker.drain_s is set by poolDefaults.drainSeconds",
    ),
    "a worker's grace too short": (
        _pool(drainSeconds=100, terminationGracePeriodSeconds=119),
        "draining takes up to 105s: use 120 or more",
    ),
    "a gateway's grace too short": (
        {"gateway": {"terminationGracePeriodSeconds": 44}},
        "take up to 35s: use 45 or more",
    ),
    "grace past the chart": (
        _pool(extraPodSpec={"terminationGracePeriodSeconds": 1}),
        "extraPodSpec.terminationGracePeriodSeconds is not yours to set",
    ),
    "restarts past the chart": (
        _pool(extraPodSpec={"restartPolicy": "Always"}),
        "extraPodSpec.restartPolicy is not yours to set",
    ),
    "HPA and replicas": (
        {"gateway": {"replicas": 3, "autoscaling": {"enabled": True}}},
        "both would own the number",
    ),
    "HPA's bounds": (
        {"gateway": {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}},
        "maxReplicas is below minReplicas",
    ),
    "no Redis": (REDIS_AWAY, "Baton needs a Redis"),
    "two Redis": ({"redis": {"embedded": {"enabled": True}}}, "are both set; choose one"),
    "two words on the Redis": ({"redis": {"existingSecret": "s"}}, "are both set; choose one"),
    "password that is no part of a URL": (
        {"redis": {"url": "", "embedded": {"enabled": True, "password": {"value": "a/b"}}}},
        "becomes part of a URL",
    ),
    "no Redis of Ray's": (RAY_REDIS_AWAY, "Ray's GCS needs a Redis of its own"),
    "two Redis of Ray's": ({"rayRedis": {"embedded": {"enabled": True}}}, "choose one"),
    "a Redis for nothing": (
        {
            "ray": {"gcsFaultTolerance": {"enabled": False}},
            "rayRedis": {"address": "", "embedded": {"enabled": True}},
        },
        "of no use without",
    ),
    "gateway of another version": (
        {"images": {"gateway": {"tag": "0.2.0"}}},
        'images.gateway.tag is "0.2.0", but this chart is made for "0.1.0"',
    ),
    "workers of another version": ({"images": {"worker": {"tag": "latest"}}}, "of one version"),
    "one pool of another version": (
        _pool(image={"tag": "0.0.9-cuda"}),
        'pools.decode.image.tag is "0.0.9-cuda"',
    ),
    "controller of another version": (
        {"images": {"controller": {"repository": "c", "tag": "9"}}},
        "images.controller.tag",
    ),
    "pools in the configuration": ({"config": {"pools": {}}}, "config.pools has a place of its"),
    "model in the configuration": ({"config": {"model": "m"}}, "config.model has a place of its"),
    "another backend": (
        {"config": {"cluster": {"backend": "processes"}}},
        "in this chart Ray starts the workers",
    ),
    "a port of the moment": ({"config": {"worker": {"port": 0}}}, "has to be a fixed port"),
    "one port for two": (
        {"config": {"worker": {"metrics_port": 7100}}},
        "pools.decode: worker.metrics_port and worker.port are both on port 7100",
    ),
    "one port for two in one pool": (
        {"pools": {"prefill": {"worker": {"metrics_port": 7100}}}},
        "pools.prefill: worker.metrics_port and worker.port are both on port 7100",
    ),
    "a port of the moment in one pool": (
        _pool(worker={"port": 0}),
        "worker.port of pools.decode has to be a fixed port",
    ),
    "a worker on a port of its Ray node": (
        _pool(worker={"port": 6380}),
        "pools.decode: node-manager-port and worker.port are both on port 6380",
    ),
    "a worker on a port that its Ray node is given": (
        _pool(rayStartParams={"metrics-export-port": "7101"}),
        "pools.decode: metrics-export-port and worker.metrics_port",
    ),
    "one port for two of Ray's head": (
        {"ray": {"ports": {"gcs": 6380}}},
        "ray.ports: node-manager-port and port are both on port 6380",
    ),
    "workers that nobody reaches": (
        {"config": {"worker": {"host": "127.0.0.1"}}},
        "worker.host of pools.decode is 127.0.0.1, where nobody outside of the pod is heard",
    ),
    "workers of one pool that nobody reaches": (
        {"pools": {"prefill": {"worker": {"host": "localhost"}}}},
        "worker.host of pools.prefill is localhost",
    ),
    "a controller that nobody reaches": (
        {"config": {"controller": {"host": "127.0.0.2"}}},
        "config.controller.host is 127.0.0.2",
    ),
    "a gateway that nobody reaches": (
        {"config": {"gateway": {"host": "::1"}}},
        "config.gateway.host is ::1",
    ),
    "a host left to Baton's default": (
        {"config": {"gateway": {"host": None}}},
        "config.gateway.host is 127.0.0.1",
    ),
    "gateways of baton serve": (
        {"config": {"gateway": {"replicas": 2}}},
        "set gateway.replicas",
    ),
    "a head that the controller does not find": (
        {"ray": {"head": {"rayStartParams": {"ray-client-server-port": "10002"}}}},
        r"go by ray.ports.client \(10001\); set that",
    ),
    "an address at which the head does not listen": (
        {"ray": {"clientAddress": "ray://chat-baton-head-svc.llm:10002"}},
        "told ray://chat-baton-head-svc.llm:10002, but the head listens on port 10001",
    ),
    "a head that computes": (
        {"ray": {"head": {"rayStartParams": {"num-cpus": "4"}}}},
        "and the head would run them; leave it out",
    ),
    "a head that is one of a pool's nodes": (
        {"ray": {"head": {"rayStartParams": {"resources": "'{\"baton-pool-decode\": 1}'"}}}},
        "and the head would run them; leave it out",
    ),
    "pods without their pool's resource": (
        _pool(rayStartParams={"resources": "'{}'"}),
        "pools.decode.rayStartParams.resources follows from the pool's name",
    ),
    "pods with too few CPUs": (
        _pool(numCpus=2, rayStartParams={"num-cpus": "1"}),
        "pools.decode.rayStartParams.num-cpus follows from the pool's numCpus",
    ),
    "pods with too few GPUs": (
        _pool(resources=GPUS, rayStartParams={"num-gpus": "1"}),
        "pools.decode.rayStartParams.num-gpus follows from the pool's resources.limits",
    ),
    "a label of everything that selects": (
        {"commonLabels": {"app.kubernetes.io/component": "llm"}},
        "commonLabels has app.kubernetes.io/component, by which",
    ),
    "a label of gateways that selects": (
        {"gateway": {"labels": {"app.kubernetes.io/instance": "llm"}}},
        "gateway.labels has app.kubernetes.io/instance",
    ),
    "a label of a pool that selects": (
        _pool(labels={"baton.dev/pool": "llm"}),
        "pools.decode.labels has baton.dev/pool",
    ),
    "a label that KubeRay sets": (
        {"ray": {"head": {"labels": {"ray.io/node-type": "worker"}}}},
        "ray.head.labels has ray.io/node-type",
    ),
    "rights for the default account": (
        {"serviceAccount": {"create": False}, "ray": {"autoscaling": {"enabled": True}}},
        "set serviceAccount.names.head",
    ),
    "clients named and all the world let in to scrape": (
        {
            "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
            "monitoring": {"serviceMonitor": {"enabled": True}},
        },
        "networkPolicy.clients is set, but .* set networkPolicy.monitoring",
    ),
    "the controller's clients named and all the world let in to scrape": (
        {
            "networkPolicy": {"controllerClients": [{"podSelector": {}}]},
            "monitoring": {"serviceMonitor": {"enabled": True}},
        },
        "networkPolicy.controllerClients is set, but",
    ),
    "an annotation of the chart's for gateways": (
        {"gateway": {"annotations": {"checksum/config": "x"}}},
        "gateway.annotations has checksum/config, by which",
    ),
    "an annotation of the chart's for a pool": (
        _pool(annotations={"baton.dev/generation": "x"}),
        "pools.decode.annotations has baton.dev/generation, by which",
    ),
    "a Redis in the place of the API key": (
        {"redis": {"key": "api-key"}},
        'redis.key is "api-key", which another secret has already',
    ),
    "no claim": ({"model": {"source": "pvc"}}, "set model.pvc.claimName"),
    "no folder": ({"model": {"source": "hostPath"}}, "set model.hostPath.path"),
    "no model image": ({"model": {"source": "image"}}, "set model.image.reference"),
    "no revision": (
        {"model": {"source": "huggingFace", "huggingFace": {"repo": "a/b"}}},
        "model.huggingFace.revision",
    ),
    "no cluster secret": ({"secrets": {"cluster": {"value": ""}}}, "secrets.cluster has no value"),
    "no Ray token": ({"secrets": {"rayToken": {"value": ""}}}, "secrets.rayToken has no value"),
    "secret given twice": (
        {"secrets": {"apiKey": {"existingSecret": "s"}}},
        "secrets.apiKey.value and secrets.apiKey.existingSecret are both set",
    ),
    "two secrets under one key": (
        {"secrets": {"apiKey": {"key": "cluster-secret"}}},
        "which another secret has already",
    ),
    "block sizes that differ": (
        _pool(engine={"block_size": 32}),
        r"block_size differs between pools \(32 in decode, 16 in prefill\).* set config\.engine",
    ),
    "dtypes that differ": (
        {"config": {"engine": {"dtype": "float32"}}, **_pool(engine={"dtype": "bfloat16"})},
        r"dtype differs between pools \(bfloat16 in decode, float32 in prefill\)",
    ),
    "weights of one pool alone": (
        _pool(engine={"load_format": "dummy"}),
        r"pools\.decode\.engine\.load_format: every pool serves the same weights",
    ),
    "long name": ({"fullnameOverride": "a" * 41}, "at most 40 characters"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_refused_in_a_sentence(name: str) -> None:
    values, sentence = MISFITS[name]
    with pytest.raises(helm.HelmRenderError) as refused:
        render(GIVEN, values)
    said = str(refused.value)
    assert re.search(sentence, said), said
    # A person reads this: it tells what to do, and nothing of templates' insides.
    assert "nil pointer" not in said
    assert said.count("error calling") <= 1


def test_a_release_name_that_cannot_name_a_ray_cluster_is_refused() -> None:
    with pytest.raises(helm.HelmRenderError, match="cannot name a RayCluster"):
        render(GIVEN, name="7b")


def test_other_tags_are_taken_from_who_knows_better() -> None:
    over = {
        "images": {"allowVersionSkew": True, "worker": {"tag": "mine"}},
        **_pool(image={"repository": "special", "tag": "yours"}),
    }
    rendered = render(GIVEN, over)
    assert rendered.worker("prefill")["image"] == "baton-worker:mine"
    assert rendered.worker("decode")["image"] == "special:yours"


def test_pools_may_say_one_by_one_what_they_have_equal() -> None:
    engine = {"block_size": 16, "dtype": "auto"}
    assert render(GIVEN, _pool(engine=engine)).documents  # the other pool's by default


def test_the_right_tag_may_be_said_and_pinned() -> None:
    digest = "sha256:" + "0" * 64
    over = {"images": {"gateway": {"tag": "0.1.0", "digest": digest}}}
    spec = render(GIVEN, over).one("Deployment", "gateway")["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == f"baton-gateway:0.1.0@{digest}"


@pytest.mark.parametrize("password", ["pa%zz", "pa#ss", "p@ss/w", "p ss"])
def test_a_password_that_is_not_escaped_is_not_shown(password: str) -> None:
    url = f"redis://:{password}@redis.data:6379/0"
    with pytest.raises(helm.HelmRenderError, match="as in %2F for /") as refused:
        render(GIVEN, {"redis": {"url": url}})
    assert password not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p%23ss~!@redis.data:6379/0",
        "rediss://user:p@redis.data:6379/1?ssl_cert_reqs=none",
        "redis://[fd00::1]:6379",
        "redis://10.0.0.7",
    ],
)
def test_urls_of_a_redis_are_taken(url: str) -> None:
    assert render(GIVEN, {"redis": {"url": url}})


@pytest.mark.parametrize("name", COMPLETE)
def test_the_chart_alone_refuses_nothing_that_its_values_files_say(name: str) -> None:
    """So each refusal above is of what the case adds."""
    assert render(merged(COMPLETE[name], {})).documents
