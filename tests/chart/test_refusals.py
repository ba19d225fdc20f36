"""What does not fit is refused when the chart is rendered, in a sentence."""

from __future__ import annotations

import re
from typing import Any

import helm_python as helm
import pytest
from support.chart import COMPLETE, GIVEN, merged, refusal, render

from baton.checkpoint.resolve import known_names

Json = dict[str, Any]


def _pool(**settings: Any) -> Json:
    return {"pools": {"decode": settings}}


GPUS = {"limits": {"nvidia.com/gpu": 2}}

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
    "shared memory between pods that a wish for another size brings": (
        {
            "config": {"kv_transfer": {"transport": "shared_memory"}},
            "pools": {"prefill": {"replicas": 0}},
        },
        "are in other pods than those of decode pools, as soon as it has any",
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
    "a name that Ray has for the head": (
        {"pools": {"HeadGroup": {"role": "decode"}}},
        "pools.headgroup: Ray calls its head's group so",
    ),
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
    "another cluster's head": (
        {"ray": {"clientAddress": "ray://chat-baton-head-svc.other:10001"}},
        "the network policies let it reach this release's head alone",
    ),
    "another cluster's head in the configuration": (
        {"config": {"cluster": {"ray_address": "ray://ray.example:10001"}}},
        "the controller is told ray://ray.example:10001, but the network policies",
    ),
    "no head in the configuration": (
        {"config": {"cluster": {"ray_address": None}}},
        "config.cluster.ray_address is empty, so the controller would start a Ray of its own",
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
    "an embedded model that is none": (
        {"model": {"embedded": {"name": "smollm2-135m-instuct"}}},
        'model.embedded.name is "smollm2-135m-instuct", which is no embedded model',
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
    "Ray's token given twice": (
        {"secrets": {"rayToken": {"existingSecret": "s"}}},
        "secrets.rayToken.value and secrets.rayToken.existingSecret are both set",
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
    assert re.search(sentence, refusal(values))


def test_a_release_name_that_cannot_name_a_ray_cluster_is_refused() -> None:
    with pytest.raises(helm.HelmRenderError, match="cannot name a RayCluster"):
        render(GIVEN, name="7b")


def test_the_embedded_models_are_batons() -> None:
    said = refusal({"model": {"embedded": {"name": "none"}}})
    assert f"there is {', '.join(known_names())};" in said
    for name in known_names():
        assert render(GIVEN, {"model": {"embedded": {"name": name}}}).documents


def test_the_name_that_no_pool_may_have_is_rays() -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config  # see tests/conftest.py

    refused = refusal({"pools": {autoscaling_config._HEAD_GROUP_NAME: {"role": "decode"}}})
    assert "Ray calls its head's group so" in refused


@pytest.mark.parametrize(
    "address",
    ["ray://chat-baton-head-svc.llm:10001", "ray://chat-baton-head-svc.llm.svc.k8s.example:10001"],
)
def test_the_head_may_be_named_in_full(address: str) -> None:
    assert render(GIVEN, {"ray": {"clientAddress": address}}).baton_yaml.count(address) == 1


def test_without_policies_the_head_may_be_anywhere() -> None:
    over: Json = {"ray": {"clientAddress": "ray://ray.example:10001"}}
    rendered = render(GIVEN, over, {"networkPolicy": {"enabled": False}})
    assert "ray://ray.example:10001" in rendered.baton_yaml


def test_without_a_prefill_pool_there_is_nothing_that_memory_cannot_be_shared_with() -> None:
    over: Json = {"config": {"kv_transfer": {"transport": "shared_memory"}}}
    assert render(GIVEN, over, {"pools": {"prefill": None}}).documents


def test_pools_may_say_one_by_one_what_they_have_equal() -> None:
    engine = {"block_size": 16, "dtype": "auto"}
    assert render(GIVEN, _pool(engine=engine)).documents  # the other pool's by default


@pytest.mark.parametrize("name", COMPLETE)
def test_the_chart_alone_refuses_nothing_that_its_values_files_say(name: str) -> None:
    """So each refusal above is of what the case adds."""
    assert render(merged(COMPLETE[name], {})).documents
