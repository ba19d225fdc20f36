"""What stands around the pods: Secrets, Redis, network policies, monitors."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from support.chart import COMPLETE, GIVEN, Rendered, render

Json = dict[str, Any]


def _plain(secret: Json) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def _references(rendered: Rendered) -> set[tuple[str, str]]:
    """(Secret, key) of every reference in any pod, KubeRay's own included."""
    found: set[tuple[str, str]] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "secretKeyRef" in value:
                found.add((value["secretKeyRef"]["name"], value["secretKeyRef"]["key"]))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(rendered.documents)
    if "authOptions" in rendered.ray:
        found.add((rendered.ray["authOptions"]["secretName"], "auth_token"))
    return found


@pytest.mark.parametrize("name", ["given", "values-cpu.yaml"])
def test_what_pods_refer_to_is_in_the_charts_secrets(name: str) -> None:
    rendered = render(COMPLETE[name])
    made = {
        (secret["metadata"]["name"], key)
        for secret in rendered.all("Secret")
        for key in secret["data"]
    }
    assert _references(rendered) == made


def test_given_values_are_what_is_kept() -> None:
    rendered = render()
    assert _plain(rendered.one("Secret", "secrets")) == {
        "cluster-secret": "a-secret",
        "controller-token": "a-token",
        "api-key": "a-key",
        "redis-url": "redis://redis.data.svc:6379/0",
    }
    assert _plain(rendered.one("Secret", "ray-token")) == {"auth_token": "a-ray-token"}


def test_secrets_of_the_user_are_used_and_none_is_made() -> None:
    rendered = render(COMPLETE["values-h100-rdma.yaml"])
    assert rendered.all("Secret") == []
    assert _references(rendered) == {
        ("baton", "cluster-secret"),
        ("baton", "controller-token"),
        ("baton", "api-key"),
        ("baton-redis", "redis-url"),
        ("baton-ray-token", "auth_token"),
        ("ray-redis", "password"),
    }


def test_no_secret_lies_in_the_open() -> None:
    rendered = render(COMPLETE["values-cpu.yaml"])
    secrets = ("a-secret", "a-token", "a-key", "a-ray-token", "a-password", "another-password")
    for document in rendered.documents:
        if document["kind"] != "Secret":
            assert not [each for each in secrets if each in str(document)]
    assert not [each for each in secrets if each in rendered.notes]


def test_generated_secrets_are_long_and_never_the_same() -> None:
    over: Json = {
        "secrets": {
            "generate": True,
            **{key: {"value": ""} for key in ("cluster", "controllerToken", "apiKey", "rayToken")},
        }
    }
    made = [
        value
        for secret in render(GIVEN, over).all("Secret")
        for key, value in _plain(secret).items()
        if key != "redis-url"
    ]
    assert len(set(made)) == len(made) == 4
    assert {len(value) for value in made} == {40}


def test_without_an_api_key_the_gateway_is_told_of_none() -> None:
    rendered = render(GIVEN, {"secrets": {"apiKey": {"enabled": False, "value": ""}}})
    spec = rendered.one("Deployment", "gateway")["spec"]["template"]["spec"]
    assert "BATON_API_KEY" not in {each["name"] for each in spec["containers"][0]["env"]}
    assert "api-key" not in rendered.one("Secret", "secrets")["data"]


@pytest.mark.parametrize("keep", [True, False])
def test_the_embedded_redis_keeps_its_data_where_wanted(keep: bool) -> None:
    over = {"redis": {"embedded": {"persistence": {"enabled": keep, "size": "3Gi"}}}}
    spec = render(COMPLETE["values-cpu.yaml"], over).one("StatefulSet", "baton-redis")["spec"]
    volumes = {each["name"] for each in spec["template"]["spec"]["volumes"]}
    assert ("data" in volumes) is not keep
    assert ("volumeClaimTemplates" in spec) is keep
    (script,) = spec["template"]["spec"]["containers"][0]["args"]
    assert ("--appendonly yes" in script) is keep
    if keep:
        (claim,) = spec["volumeClaimTemplates"]
        assert claim["spec"]["resources"]["requests"]["storage"] == "3Gi"
    # The password comes from the environment and goes into a file.
    assert "$REDISCLI_AUTH" in script
    assert "umask 077" in script


RELEASE = {"targetLabel": "release"}


def test_monitors_tell_releases_apart() -> None:
    """By the label that the alerts and the dashboard ask for."""
    on = {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}
    rendered = render(COMPLETE["values-cpu.yaml"], {"monitoring": on})
    source = "label_app_kubernetes_io_instance"
    for component in ("gateway", "controller"):
        (endpoint,) = rendered.one("ServiceMonitor", component)["spec"]["endpoints"]
        (rule,) = endpoint["relabelings"]
        assert rule == {"sourceLabels": [f"__meta_kubernetes_service_{source}"], **RELEASE}
        service = rendered.one("Service", f"baton-{component}")
        assert service["metadata"]["labels"]["app.kubernetes.io/instance"] == "chat"
    (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    (rule,) = endpoint["relabelings"]
    assert rule == {"sourceLabels": [f"__meta_kubernetes_pod_{source}"], **RELEASE}
    pod = rendered.group("decode")["template"]["metadata"]
    assert pod["labels"]["app.kubernetes.io/instance"] == "chat"


def test_monitors_find_ports_that_there_are() -> None:
    over = {
        "monitoring": {
            "labels": {"release": "prometheus"},
            "serviceMonitor": {"enabled": True},
            "podMonitor": {"enabled": True},
        }
    }
    rendered = render(COMPLETE["values-cpu.yaml"], over)
    for monitor in rendered.all("ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        name = monitor["metadata"]["name"]
        service = rendered.one("Service", name.removeprefix("chat-baton"))
        assert endpoint["port"] in {each["name"] for each in service["spec"]["ports"]}
        wanted = monitor["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= service["metadata"]["labels"].items()
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = rendered.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {each["name"] for each in rendered.worker()["ports"]}
    assert len(rendered.all("ServiceMonitor")) == 2
    plain = render(COMPLETE["values-cpu.yaml"])
    assert plain.all("ServiceMonitor") == plain.all("PodMonitor") == []


def test_labels_of_the_user_are_on_everything() -> None:
    rendered = render(COMPLETE["values-cpu.yaml"], {"commonLabels": {"team": "a"}})
    groups = (rendered.ray["headGroupSpec"], *rendered.ray["workerGroupSpecs"])
    pods = [each["template"]["metadata"] for each in groups]
    pods += [each["spec"]["template"]["metadata"] for each in rendered.all("Deployment")]
    for metadata in [*pods, *(document["metadata"] for document in rendered.documents)]:
        assert metadata["labels"]["team"] == "a"


def test_labels_of_monitors_go_over_those_of_everything() -> None:
    on = {"labels": {"team": "b"}, "serviceMonitor": {"enabled": True}}
    over = {"commonLabels": {"team": "a"}, "monitoring": {**on, "podMonitor": {"enabled": True}}}
    rendered = render(GIVEN, over)
    monitors = rendered.all("ServiceMonitor") + rendered.all("PodMonitor")
    assert [each["metadata"]["labels"]["team"] for each in monitors] == ["b", "b", "b"]
    assert rendered.one("Deployment", "gateway")["metadata"]["labels"]["team"] == "a"


@pytest.mark.parametrize("word", ["true", "null", "on", "yes"])
def test_names_that_yaml_takes_for_something_else_stay_names(word: str) -> None:
    over: Json = {
        "fullnameOverride": word,
        "pools": {word: {"role": "decode", "replicas": 2}},
        "secrets": {"apiKey": {"key": word}},
    }
    rendered = render(COMPLETE["values-cpu.yaml"], over, name=word)
    assert rendered.one("RayCluster")["metadata"]["name"] == word
    pod = rendered.group(word)["template"]["metadata"]["labels"]
    assert pod["baton.dev/pool"] == pod["app.kubernetes.io/instance"] == word
    assert word in rendered.one("Secret", "secrets")["data"]
    policy = rendered.one("NetworkPolicy", "-head")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": word}
    for document in rendered.documents:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == word


def test_a_release_may_be_named_by_a_number() -> None:
    labels = render(GIVEN, {"fullnameOverride": "x"}, name="123").one("ConfigMap")["metadata"]
    assert labels["labels"]["app.kubernetes.io/instance"] == "123"


def _given_anew(over: Json) -> set[str]:
    """Whose pods are others when ``over`` is given."""

    def checksums(*over: Json) -> dict[str, str]:
        rendered = render(COMPLETE["values-cpu.yaml"], *over)
        groups = {"head": rendered.ray["headGroupSpec"], "workers": rendered.group("decode")}
        found = {
            name: rendered.one(kind, name)["spec"]
            for kind, name in (
                ("Deployment", "gateway"),
                ("Deployment", "controller"),
                ("StatefulSet", "baton-redis"),
                ("StatefulSet", "ray-redis"),
            )
        }
        return {
            name: each["template"]["metadata"]["annotations"]["checksum/secrets"]
            for name, each in {**found, **groups}.items()
        }

    before, after = checksums(), checksums(over)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("over", "whose"),
    [
        ({"secrets": {"apiKey": {"value": "n"}}}, {"gateway"}),
        ({"secrets": {"controllerToken": {"value": "n"}}}, {"controller"}),
        ({"secrets": {"cluster": {"value": "n"}}}, {"gateway", "controller", "workers"}),
        ({"secrets": {"rayToken": {"value": "n"}}}, {"controller", "head", "workers"}),
        ({"rayRedis": {"password": {"value": "n"}}}, {"head", "ray-redis"}),
        (
            {"redis": {"embedded": {"password": {"value": "n"}}}},
            {"gateway", "controller", "workers", "baton-redis"},
        ),
        ({"secrets": {"generate": True}}, set()),
        ({"redis": {"embedded": {"resources": {"limits": {"memory": "1Gi"}}}}}, set()),
    ],
)
def test_a_secret_given_anew_restarts_those_who_read_it(over: Json, whose: set[str]) -> None:
    assert _given_anew(over) == whose


def test_accounts_of_the_user_are_used() -> None:
    over = {"serviceAccount": {"create": False, "names": {"worker": "mine"}}}
    rendered = render(GIVEN, over)
    assert rendered.all("ServiceAccount") == []
    accounts = {name: spec["serviceAccountName"] for name, spec in rendered.pod_specs()}
    assert accounts["decode"] == "mine"
    assert accounts["chat-baton-gateway"] == "default"
    over = {"serviceAccount": {"create": False, "names": {"head": "scaler"}}}
    scaled = render(GIVEN, over, {"ray": {"autoscaling": {"enabled": True}}})
    assert dict(scaled.pod_specs())["head"]["serviceAccountName"] == "scaler"


def test_the_notes_tell_of_a_redis_whose_port_the_chart_cannot_read() -> None:
    hidden: Json = {"redis": {"url": "", "existingSecret": "baton-redis"}}
    notes = render(GIVEN, hidden, {"networkPolicy": {"redis": {"port": 6390}}}).notes
    assert "network policies open port 6390 to Redis" in notes
    assert "baton-redis: where that names another port, set networkPolicy.redis.port" in notes
    for rendered in (render(), render(GIVEN, hidden, {"networkPolicy": {"enabled": False}})):
        assert "networkPolicy.redis.port" not in rendered.notes


def test_the_notes_ask_for_a_model_by_a_name_that_it_has() -> None:
    def asked(name: str) -> str:
        notes = render(GIVEN, {"model": {"embedded": {"name": name}}}).notes
        return notes.split('"model": ')[1].split(",")[0]

    assert asked("smollm2-135m-instruct") == '"smollm2-135m-instruct"'
    # A path is no id; the other sources' folders are none either.
    assert asked("/opt/model.gguf") == '"default"'


def test_names_follow_the_release() -> None:
    assert render(name="baton").one("RayCluster")["metadata"]["name"] == "baton"
    assert "ray://baton-head-svc:10001" in render(name="baton").baton_yaml
    named = render(GIVEN, {"fullnameOverride": "mine"})
    assert named.one("Service", "gateway")["metadata"]["name"] == "mine-gateway"
    # Two releases on one Redis do not meet.
    assert "cluster: baton" in render(name="baton").baton_yaml
