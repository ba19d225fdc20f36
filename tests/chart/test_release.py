"""Install, upgrade, rollback, uninstall: by Helm itself, against a small fake API server."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml
from support.chart import CHART, COMPLETE, GIVEN, merged, render, values_file
from support.helm_release import Release, release

Json = dict[str, Any]

CPU = COMPLETE["values-cpu.yaml"]
AUTOSCALED: Json = {"ray": {"autoscaling": {"enabled": True}}}
APPLIES = pytest.mark.parametrize("server_side_apply", ["true", "false"])
"""Helm 4's way of writing objects, and the one of Helm 3."""


@pytest.fixture
def chat() -> Iterator[Release]:
    with release() as running:
        yield running


def _decode(replicas: int) -> Json:
    return {"pools": {"decode": {"replicas": replicas}}}


def _unchanged(chat: Release, values: Json) -> bool:
    """Whether the live objects are what the values render, but for what the server adds."""
    for document in render(values).documents:
        live = chat.cluster.find(document["kind"], document["metadata"]["name"])
        for part in ("spec", "data"):
            if live.get(part) != document.get(part):
                return False
    return True


@APPLIES
@pytest.mark.parametrize("name", ["given", "values-cpu.yaml"])
def test_install_and_uninstall(chat: Release, name: str, server_side_apply: str) -> None:
    values = COMPLETE[name]
    answer = chat.install(values, server_side_apply=server_side_apply == "true")
    assert answer["status"] == "deployed"
    rendered = {(d["kind"], d["metadata"]["name"]) for d in render(values).documents}
    assert chat.cluster.names() == rendered
    assert _unchanged(chat, values)
    chat.uninstall()
    assert chat.cluster.names() == set()


@APPLIES
def test_upgrade_with_other_replicas_and_rollback(chat: Release, server_side_apply: str) -> None:
    chat.install(CPU, server_side_apply=server_side_apply == "true")
    head = chat.cluster.find("RayCluster", "chat-baton")["spec"]["headGroupSpec"]
    gateway = chat.cluster.find("Deployment", "chat-baton-gateway")["spec"]
    answer = chat.upgrade(merged(CPU, _decode(3)), server_side_apply=server_side_apply)
    assert (answer["status"], answer["revision"]) == ("deployed", 2)
    assert chat.replicas() == {"prefill": 1, "decode": 3}
    assert _unchanged(chat, merged(CPU, _decode(3)))
    # Sizes alone move nothing else: no gateway rolls, no worker is replaced.
    assert chat.cluster.find("Deployment", "chat-baton-gateway")["spec"] == gateway
    assert chat.cluster.find("RayCluster", "chat-baton")["spec"]["headGroupSpec"] == head
    chat.roll_back(1)
    assert chat.replicas() == {"prefill": 1, "decode": 1}
    assert _unchanged(chat, CPU)
    assert [each["status"] for each in chat.history] == ["superseded", "superseded", "deployed"]


@APPLIES
def test_an_upgrade_takes_away_what_is_no_longer_wanted(
    chat: Release, server_side_apply: str
) -> None:
    scaled = merged(CPU, {"gateway": {"replicas": None, "autoscaling": {"enabled": True}}})
    chat.install(scaled, server_side_apply=server_side_apply == "true")
    assert ("HorizontalPodAutoscaler", "chat-baton-gateway") in chat.cluster.names()
    fewer = merged(CPU, {"pools": {"prefill": None}})
    chat.upgrade(fewer, server_side_apply=server_side_apply)
    assert ("HorizontalPodAutoscaler", "chat-baton-gateway") not in chat.cluster.names()
    assert ("PodDisruptionBudget", "chat-baton-pool-prefill") not in chat.cluster.names()
    assert chat.replicas() == {"decode": 1}


@APPLIES
def test_the_hpa_takes_over_the_gateways_that_there_are(
    chat: Release, server_side_apply: str
) -> None:
    def gateways() -> int:
        found: int = chat.cluster.find("Deployment", "chat-baton-gateway")["spec"]["replicas"]
        return found

    chat.install(
        merged(CPU, {"gateway": {"replicas": 4}}), server_side_apply=server_side_apply == "true"
    )
    scaling: Json = {"enabled": True, "minReplicas": 3}
    scaled = merged(CPU, {"gateway": {"replicas": None, "autoscaling": scaling}})
    chat.upgrade(scaled, server_side_apply=server_side_apply)
    assert gateways() == 4
    # What the HPA does, and after it an upgrade that asks for more.
    size = [{"op": "replace", "path": "/spec/replicas", "value": 6}]
    chat.cluster.patch("Deployment", "chat-baton-gateway", size, manager="kube-controller-manager")
    more = merged(scaled, {"gateway": {"autoscaling": {"minReplicas": 8}, "preStopSeconds": 9}})
    chat.upgrade(more, server_side_apply=server_side_apply)
    assert gateways() == 6


@APPLIES
@pytest.mark.parametrize("size", [0, 2, 5])
def test_an_upgrade_keeps_the_sizes_of_the_autoscaler(
    chat: Release, size: int, server_side_apply: str
) -> None:
    values = merged(CPU, AUTOSCALED)
    chat.install(values, server_side_apply=server_side_apply == "true")
    chat.scale("prefill", size, leaving=("pod-1",))
    other = merged(values, {"pools": {"decode": {"replicas": 3}}, "gateway": {"replicas": 4}})
    chat.upgrade(other, server_side_apply=server_side_apply)
    # The autoscaler's word stands, also against a changed value of the user's.
    assert chat.replicas() == {"prefill": size, "decode": 1}
    ray = chat.cluster.find("RayCluster", "chat-baton")["spec"]
    (prefill,) = (g for g in ray["workerGroupSpecs"] if g["groupName"] == "prefill")
    assert prefill["scaleStrategy"] == {"workersToDelete": ["pod-1"]}
    assert chat.cluster.find("Deployment", "chat-baton-gateway")["spec"]["replicas"] == 4


@APPLIES
@pytest.mark.parametrize(("live", "bounds", "rendered"), [(5, (0, 3), 3), (1, (2, 8), 2)])
def test_an_upgrade_keeps_the_autoscalers_size_within_new_bounds(
    chat: Release, live: int, bounds: tuple[int, int], rendered: int, server_side_apply: str
) -> None:
    values = merged(CPU, AUTOSCALED)
    chat.install(values, server_side_apply=server_side_apply == "true")
    chat.scale("decode", live)
    least, most = bounds
    pool = {"replicas": 2, "minReplicas": least, "maxReplicas": most}
    forced = {"force_conflicts": True} if server_side_apply == "true" else {}
    bounded = merged(values, {"pools": {"decode": pool}})
    chat.upgrade(bounded, server_side_apply=server_side_apply, **forced)
    assert chat.replicas() == {"prefill": 1, "decode": rendered}


@APPLIES
@pytest.mark.parametrize("before", [False, True])
def test_an_embedded_redis_that_is_to_keep_its_data_is_made_anew(
    chat: Release, before: bool, server_side_apply: str
) -> None:
    """As docs/deploy.md says: Kubernetes changes no StatefulSet's volumes."""

    def keeping(keep: bool) -> Json:
        return merged(CPU, {"redis": {"embedded": {"persistence": {"enabled": keep}}}})

    def keeps() -> bool:
        redis = chat.cluster.find("StatefulSet", "chat-baton-redis")
        return "volumeClaimTemplates" in redis["spec"]

    chat.install(keeping(before), server_side_apply=server_side_apply == "true")
    with pytest.raises(helm.HelmReleaseError, match=r"updates to statefulset spec .* forbidden"):
        chat.upgrade(keeping(not before), server_side_apply=server_side_apply)
    assert keeps() is before
    chat.cluster.delete("StatefulSet", "chat-baton-redis")
    chat.upgrade(keeping(not before), server_side_apply=server_side_apply)
    assert keeps() is not before


@APPLIES
def test_a_redis_takes_another_image_in_place(chat: Release, server_side_apply: str) -> None:
    """So what is refused above is the change of its volumes."""
    chat.install(CPU, server_side_apply=server_side_apply == "true")
    chat.upgrade(
        merged(CPU, {"images": {"redis": {"tag": "8-alpine"}}}),
        server_side_apply=server_side_apply,
    )
    redis = chat.cluster.find("StatefulSet", "chat-baton-redis")["spec"]["template"]["spec"]
    assert redis["containers"][0]["image"] == "docker.io/library/redis:8-alpine"


@APPLIES
def test_without_the_autoscaler_helm_owns_the_sizes(chat: Release, server_side_apply: str) -> None:
    chat.install(CPU, server_side_apply=server_side_apply == "true")
    chat.scale("decode", 5)
    forced = {"force_conflicts": True} if server_side_apply == "true" else {}
    chat.upgrade(merged(CPU, _decode(2)), server_side_apply=server_side_apply, **forced)
    assert chat.replicas() == {"prefill": 1, "decode": 2}


def test_a_change_of_pods_meets_the_autoscalers_hand_and_can_be_forced(chat: Release) -> None:
    """The list of groups is one field to Kubernetes; docs/deploy.md tells of the option."""
    values = merged(CPU, AUTOSCALED)
    chat.install(values, server_side_apply=True)
    chat.scale("decode", 4)
    changed = merged(values, {"pools": {"prefill": {"drainSeconds": 99}}})
    with pytest.raises(helm.HelmReleaseError, match=r"conflict.*workerGroupSpecs"):
        chat.upgrade(changed, server_side_apply="true")
    assert chat.replicas() == {"prefill": 1, "decode": 4}
    chat.upgrade(changed, server_side_apply="true", force_conflicts=True)
    assert chat.replicas() == {"prefill": 1, "decode": 4}
    ray = chat.cluster.find("RayCluster", "chat-baton")["spec"]
    (prefill,) = (g for g in ray["workerGroupSpecs"] if g["groupName"] == "prefill")
    assert prefill["template"]["spec"]["terminationGracePeriodSeconds"] == 119


def _secrets(chat: Release) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("chat-baton-secrets", "chat-baton-ray-token"):
        found |= chat.cluster.find("Secret", name)["data"]
    return found


@APPLIES
def test_generated_secrets_outlive_upgrades(chat: Release, server_side_apply: str) -> None:
    values = merged(CPU, {"secrets": _none_given(), "redis": _none_given("redis")})
    values["secrets"]["generate"] = True
    values["rayRedis"]["password"]["value"] = ""
    chat.install(values, server_side_apply=server_side_apply == "true")
    before = _secrets(chat)
    assert len(before) == 6
    chat.upgrade(merged(values, _decode(2)), server_side_apply=server_side_apply)
    assert _secrets(chat) == before
    # Nor is the permission to generate needed any more, once they are there.
    values["secrets"]["generate"] = False
    chat.upgrade(values, server_side_apply=server_side_apply)
    assert _secrets(chat) == before


def _none_given(part: str = "secrets") -> Json:
    if part == "redis":
        return {"embedded": {"password": {"value": ""}}}
    return {key: {"value": ""} for key in ("cluster", "controllerToken", "apiKey", "rayToken")}


def test_a_given_secret_replaces_the_live_one(chat: Release) -> None:
    chat.install(GIVEN)
    chat.upgrade(merged(GIVEN, {"secrets": {"apiKey": {"value": "another"}}}))
    assert base64.b64decode(_secrets(chat)["api-key"]) == b"another"
    assert base64.b64decode(_secrets(chat)["cluster-secret"]) == b"a-secret"


def test_a_live_secret_that_baton_would_refuse_is_not_kept(chat: Release) -> None:
    chat.install(GIVEN)
    data = {"op": "replace", "path": "/data/api-key", "value": base64.b64encode(b"a b").decode()}
    chat.cluster.patch("Secret", "chat-baton-secrets", [data], manager="kubectl")
    with pytest.raises(
        helm.HelmError, match=r"key api-key of the Secret chat-baton-secrets.*ASCII"
    ):
        chat.upgrade(merged(GIVEN, {"secrets": {"apiKey": {"value": ""}}}))


def test_the_trial_values_install_as_they_are(chat: Release) -> None:
    """values-cpu.yaml without anything given, as its first line says."""
    chat.install(yaml.safe_load((CHART / "values-cpu.yaml").read_text()))
    assert values_file("values-cpu.yaml")["secrets"]["generate"] is False  # what tests use
    assert len(_secrets(chat)) == 6


def test_a_misfit_changes_nothing(chat: Release) -> None:
    chat.install(CPU)
    before = chat.cluster.find("RayCluster", "chat-baton")
    with pytest.raises(helm.HelmError, match="no pool of role decode"):
        chat.upgrade(merged(CPU, _decode(0)))
    assert chat.cluster.find("RayCluster", "chat-baton") == before
