"""Each setting of a pool, and where it ends up."""

from __future__ import annotations

from typing import Any

import pytest
from support.chart import GIVEN, Rendered, render

Json = dict[str, Any]


def _decode(**settings: Any) -> Rendered:
    return render(GIVEN, {"pools": {"decode": settings}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nodeSelector", {"gpu": "h100"}),
        ("tolerations", [{"key": "gpu", "operator": "Exists"}]),
        ("affinity", {"podAntiAffinity": {}}),
        (
            "topologySpreadConstraints",
            [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
        ),
        ("priorityClassName", "high"),
        ("runtimeClassName", "nvidia"),
    ],
)
def test_placement_goes_to_the_pods_spec(key: str, value: Any) -> None:
    rendered = _decode(**{key: value})
    assert rendered.group("decode")["template"]["spec"][key] == value
    assert key not in rendered.group("prefill")["template"]["spec"]


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probes_can_be_replaced(probe: str) -> None:
    own = {"exec": {"command": ["true"]}, "periodSeconds": 99}
    rendered = _decode(**{probe: own})
    found = rendered.worker("decode")[probe]
    assert own.items() <= found.items()
    assert "tcpSocket" not in found
    assert "tcpSocket" in rendered.worker("prefill")[probe]


@pytest.mark.parametrize("component", ["gateway", "controller"])
@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_probes_of_deployments_can_be_replaced(component: str, probe: str) -> None:
    own = {"tcpSocket": {"port": 1}}
    rendered = render(GIVEN, {component: {probe: own}})
    spec = rendered.one("Deployment", component)["spec"]["template"]["spec"]
    assert spec["containers"][0][probe]["tcpSocket"] == {"port": 1}
    assert "httpGet" not in spec["containers"][0][probe]


def test_resources_replace_the_defaults_as_a_whole() -> None:
    rendered = _decode(resources={"limits": {"nvidia.com/gpu": 1}})
    assert rendered.worker("decode")["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert rendered.worker("prefill")["resources"]["requests"] == {"cpu": "4", "memory": "16Gi"}


def test_settings_that_belong_together_are_completed_by_the_defaults() -> None:
    budget = {"replicas": 3, "podDisruptionBudget": {"enabled": True}}
    rendered = render(GIVEN, {"pools": {"decode": budget}})
    (found,) = [
        b for b in rendered.all("PodDisruptionBudget") if b["metadata"]["name"].endswith("decode")
    ]
    assert found["spec"]["minAvailable"] == 2, "no pod could ever be evicted"
    rdma = {"enabled": True, "resourceName": "r", "count": 1}
    pools = {"decode": {"rdma": rdma}, "prefill": {"rdma": rdma}}
    rendered = render(GIVEN, {"config": {"kv_transfer": {"transport": "nixl"}}, "pools": pools})
    environment = {e["name"]: e.get("value") for e in rendered.worker("decode")["env"]}
    assert environment["UCX_TLS"] == "rc,cuda_copy,cuda_ipc,sm,self"


def test_defaults_reach_every_pool() -> None:
    rendered = render(GIVEN, {"poolDefaults": {"shmSize": "9Gi", "labels": {"team": "a"}}})
    for group in rendered.ray["workerGroupSpecs"]:
        volumes = {each["name"]: each for each in group["template"]["spec"]["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "9Gi"}
        assert group["template"]["metadata"]["labels"]["team"] == "a"


def test_shared_memory_is_where_ray_looks() -> None:
    mounts = {m["name"]: m["mountPath"] for m in _decode().worker()["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"
    assert mounts["run"] == "/run/baton"


def test_labels_annotations_and_environment() -> None:
    rendered = _decode(
        labels={"team": "a"}, annotations={"note": "b"}, env=[{"name": "A", "value": "c"}]
    )
    metadata = rendered.group("decode")["template"]["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"]["note"] == "b"
    assert {"name": "A", "value": "c"} in rendered.worker("decode")["env"]
    assert "team" not in rendered.group("prefill")["template"]["metadata"]["labels"]


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, f"baton-worker:0.1.0-cuda@{DIGEST}"),
        ({"repository": "special"}, "special:0.1.0"),
        ({"repository": "special", "suffix": "-x"}, "special:0.1.0-x"),
        ({"tag": "0.1.0"}, "baton-worker:0.1.0"),
        ({"digest": ""}, "baton-worker:0.1.0-cuda"),
        ({"suffix": "", "digest": ""}, "baton-worker:0.1.0"),
    ],
)
def test_an_image_of_its_own(image: Json, expected: str) -> None:
    all_workers = {"images": {"worker": {"digest": DIGEST}}}
    rendered = render(GIVEN, all_workers, {"pools": {"decode": {"image": image}}})
    assert rendered.worker("decode")["image"] == expected
    assert rendered.worker("prefill")["image"] == f"baton-worker:0.1.0-cuda@{DIGEST}"


def test_replicas_of_a_group() -> None:
    group = _decode(replicas=3, minReplicas=2, maxReplicas=7).group("decode")
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 2, 7]
    assert group["numOfHosts"] == 1


def test_ray_start_parameters_of_a_pool_win() -> None:
    over = {"node-manager-port": "7999", "node-ip-address": "127.0.0.1"}
    rendered = _decode(rayStartParams=over)
    assert over.items() <= rendered.group("decode")["rayStartParams"].items()
    # The probe follows.
    assert rendered.worker("decode")["livenessProbe"]["tcpSocket"]["port"] == 7999


def test_extra_pod_spec_adds_to_lists_and_replaces_the_rest() -> None:
    rendered = _decode(
        extraPodSpec={
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "securityContext": {"fsGroup": 7},
            "containers": [{"name": "side", "image": "x"}],
            "initContainers": [{"name": "first", "image": "y"}],
            "volumes": [{"name": "more", "emptyDir": {}}],
        }
    )
    spec = rendered.group("decode")["template"]["spec"]
    assert spec["hostNetwork"] is True
    assert spec["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert spec["securityContext"]["fsGroup"] == 7
    assert spec["securityContext"]["runAsNonRoot"] is True
    # Ray's container has to be the first: KubeRay takes it for that.
    assert [each["name"] for each in spec["containers"]] == ["ray-worker", "side"]
    assert [each["name"] for each in spec["initContainers"]] == ["first"]
    assert {"run", "more"} <= {each["name"] for each in spec["volumes"]}


@pytest.mark.parametrize("component", ["gateway", "controller"])
def test_extra_pod_spec_of_deployments(component: str) -> None:
    rendered = render(GIVEN, {component: {"extraPodSpec": {"hostname": "h"}}})
    spec = rendered.one("Deployment", component)["spec"]["template"]["spec"]
    assert spec["hostname"] == "h"
    assert spec["containers"][0]["name"] == component


def test_extra_pod_spec_of_the_head() -> None:
    rendered = render(GIVEN, {"ray": {"head": {"extraPodSpec": {"hostname": "h"}}}})
    spec = rendered.ray["headGroupSpec"]["template"]["spec"]
    assert (spec["hostname"], spec["containers"][0]["name"]) == ("h", "ray-head")


def test_a_removed_pool_leaves_nothing() -> None:
    rendered = render(GIVEN, {"pools": {"prefill": None}})
    assert [group["groupName"] for group in rendered.ray["workerGroupSpecs"]] == ["decode"]
    assert "pool-prefill" not in rendered.text


def test_the_model_is_downloaded_before_anything_starts() -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    source = {"repo": "org/model", "revision": commit, "sizeLimit": "9Gi"}
    over = {
        "model": {"source": "huggingFace", "huggingFace": source},
        "secrets": {"huggingFace": {"existingSecret": "hf", "key": "token"}},
    }
    rendered = render(GIVEN, over)
    for name in ("chat-baton-gateway", "prefill", "decode"):
        spec = dict(rendered.pod_specs())[name]
        (download,) = spec["initContainers"]
        assert download["command"] == [
            *("hf", "download", "org/model", "--revision", commit, "--local-dir", "/models")
        ]
        assert download["image"] == spec["containers"][0]["image"]
        env = {each["name"]: each for each in download["env"]}
        reference = env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "hf", "key": "token"}
        (volume,) = (each for each in spec["volumes"] if each["name"] == "model")
        assert volume["emptyDir"] == {"sizeLimit": "9Gi"}


def test_the_cache_can_lie_on_a_claim() -> None:
    rendered = render(GIVEN, {"cacheVolume": {"persistentVolumeClaim": {"claimName": "c"}}})
    for name in ("chat-baton-gateway", "decode"):
        volumes = {v["name"]: v for v in dict(rendered.pod_specs())[name]["volumes"]}
        assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}
    volumes = {v["name"]: v for v in dict(render().pod_specs())["decode"]["volumes"]}
    assert volumes["cache"] == {"name": "cache", "emptyDir": {}}


def test_autoscaling_settings_reach_kuberay() -> None:
    over: Json = {
        "ray": {"autoscaling": {"enabled": True, "idleTimeoutSeconds": 77}},
        "pools": {"decode": {"idleTimeoutSeconds": 44}},
    }
    ray = render(GIVEN, over).ray
    assert ray["enableInTreeAutoscaling"] is True
    assert ray["autoscalerOptions"]["idleTimeoutSeconds"] == 77
    assert ray["autoscalerOptions"]["version"] == "v2"
    idle = {
        group["groupName"]: group.get("idleTimeoutSeconds") for group in ray["workerGroupSpecs"]
    }
    assert idle == {"decode": 44, "prefill": None}
    off = render(GIVEN, {"pools": {"decode": {"idleTimeoutSeconds": 44}}}).ray
    assert off["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in off
    assert all("idleTimeoutSeconds" not in group for group in off["workerGroupSpecs"])


def test_the_dashboard_listens_only_when_it_is_wanted() -> None:
    for wanted, host in ((True, "0.0.0.0"), (False, "127.0.0.1")):
        params = render(GIVEN, {"ray": {"head": {"dashboard": wanted}}}).ray["headGroupSpec"]
        assert params["rayStartParams"]["include-dashboard"] == str(wanted).lower()
        assert params["rayStartParams"]["dashboard-host"] == host
