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


# Who may talk to whom. Labels as the pods have them, KubeRay's own included.
_RAY = {"ray.io/cluster": "chat-baton"}
_RELEASE = {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/part-of": "baton"}
PODS: dict[str, dict[str, str]] = {
    "gateway": {**_RELEASE, "app.kubernetes.io/component": "gateway"},
    "controller": {**_RELEASE, "app.kubernetes.io/component": "controller"},
    "redis": {**_RELEASE, "app.kubernetes.io/component": "redis"},
    "ray-redis": {**_RELEASE, "app.kubernetes.io/component": "ray-redis"},
    "head": {**_RELEASE, **_RAY, "app.kubernetes.io/component": "head", "ray.io/node-type": "head"},
    "cleanup": {
        **_RELEASE,
        **_RAY,
        "app.kubernetes.io/component": "head",
        "ray.io/node-type": "redis-cleanup",
    },
    "worker": {
        **_RELEASE,
        **_RAY,
        "app.kubernetes.io/component": "worker",
        "ray.io/node-type": "worker",
    },
    "prometheus": {"app": "prometheus"},
    "stranger": {"app.kubernetes.io/instance": "other"},
}
_ELSEWHERE = {"stranger": "other", "prometheus": "monitoring"}
"""Namespaces of pods that are not in the release's own."""
PORTS = {"http": 8000, "session": 7100, "baton-metrics": 7101, "redis": 6379, "client": 10001}


def _selects(selector: Json, labels: dict[str, str]) -> bool:
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "NotIn"
        if labels.get(rule["key"]) in rule["values"]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _allows(rules: list[Json], side: str, peer: str, port: int | str) -> bool:
    for rule in rules:
        ports = [each["port"] for each in rule.get("ports", [])]
        if ports and port not in ports and PORTS.get(str(port)) not in ports:
            continue
        peers = rule.get(side)
        if peers is None or any(_is_meant(each, peer) for each in peers):
            return True
    return False


def _is_meant(selectors: Json, pod: str) -> bool:
    """Whether one entry of a rule's peers selects that pod, a namespace's selector included."""
    namespace = _ELSEWHERE.get(pod, "llm")
    if "namespaceSelector" in selectors:
        labels = {"kubernetes.io/metadata.name": namespace}
        if not _selects(selectors["namespaceSelector"], labels):
            return False
    elif "podSelector" not in selectors or namespace != "llm":
        return False
    return _selects(selectors.get("podSelector", {}), PODS[pod])


def _passes(rendered: Rendered, pod: str, rules: str, peer: str, port: int | str) -> bool:
    """Whether the policies of ``pod`` let it speak to ``peer`` (egress) or be spoken to."""
    policies = [
        policy["spec"]
        for policy in rendered.all("NetworkPolicy")
        if _selects(policy["spec"]["podSelector"], PODS[pod])
    ]
    side = "to" if rules == "egress" else "from"
    return not policies or any(_allows(p.get(rules, []), side, peer, port) for p in policies)


def _may(rendered: Rendered, source: str, target: str, port: int | str) -> bool:
    """Whether policies let ``source`` open a connection to that port of ``target``."""
    leaves = _passes(rendered, source, "egress", target, port)
    return leaves and _passes(rendered, target, "ingress", source, port)


ALLOWED = [
    ("stranger", "gateway", "http"),
    ("gateway", "worker", "session"),
    ("gateway", "redis", "redis"),
    ("controller", "redis", "redis"),
    ("controller", "head", "client"),
    ("controller", "worker", "session"),
    ("worker", "redis", "redis"),
    ("worker", "worker", 45678),
    ("worker", "head", 6379),
    ("head", "worker", 6380),
    ("head", "ray-redis", "redis"),
    ("cleanup", "ray-redis", "redis"),
]
FORBIDDEN = [
    ("stranger", "worker", "session"),
    ("stranger", "head", "client"),
    ("stranger", "redis", "redis"),
    ("stranger", "controller", "http"),
    ("stranger", "worker", "baton-metrics"),
    ("gateway", "worker", 45678),
    ("gateway", "head", "client"),
    ("gateway", "ray-redis", "redis"),
    ("gateway", "controller", "http"),
    ("worker", "ray-redis", "redis"),
    ("worker", "gateway", "http"),
    ("worker", "stranger", 443),
    ("head", "redis", "redis"),
    ("head", "stranger", 443),
    ("controller", "head", 6379),
    ("redis", "worker", "session"),
]


@pytest.mark.parametrize(("source", "target", "port"), ALLOWED)
def test_policies_allow_what_baton_does(source: str, target: str, port: int | str) -> None:
    assert _may(render(COMPLETE["values-cpu.yaml"]), source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), FORBIDDEN)
def test_policies_forbid_everything_else(source: str, target: str, port: int | str) -> None:
    rendered = render(COMPLETE["values-cpu.yaml"])
    assert not _may(rendered, source, target, port)
    # Without policies it would get through: the test looks at the right thing.
    assert _may(
        render(COMPLETE["values-cpu.yaml"], {"networkPolicy": {"enabled": False}}),
        source,
        target,
        port,
    )


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [each for each in FORBIDDEN if each[1] not in ("stranger", "gateway")],
)
def test_a_pod_defends_itself(source: str, target: str, port: int | str) -> None:
    """Also against peers whose own policies would stop them anyhow."""
    assert not _passes(render(COMPLETE["values-cpu.yaml"]), target, "ingress", source, port)


@pytest.mark.parametrize(
    "pod", [name for name in PODS if name not in (*_ELSEWHERE, "redis", "ray-redis")]
)
def test_pods_may_ask_for_names(pod: str) -> None:
    assert _may(render(COMPLETE["values-cpu.yaml"]), pod, "stranger", 53)


def test_only_the_autoscaler_may_ask_the_kubernetes_api() -> None:
    scaled = render(COMPLETE["values-cpu.yaml"], {"ray": {"autoscaling": {"enabled": True}}})
    assert _may(scaled, "head", "stranger", 6443)
    for pod in ("worker", "gateway", "controller"):
        assert not _may(scaled, pod, "stranger", 6443)


def test_redis_outside_of_the_release_is_reached_on_its_port_alone() -> None:
    to = [{"ipBlock": {"cidr": "10.1.0.0/16"}}]
    policy = {"redis": {"to": to, "port": 6390}}
    url = "redis://:p@redis.example:6390/0"
    rendered = render(GIVEN, {"networkPolicy": policy, "redis": {"url": url}})
    for name in ("gateway", "controller", "worker"):
        rules = rendered.one("NetworkPolicy", name)["spec"]["egress"]
        assert {"ports": [{"port": 6390, "protocol": "TCP"}], "to": to} in rules
    head = rendered.one("NetworkPolicy", "head")["spec"]["egress"]
    assert {"ports": [{"port": 6379, "protocol": "TCP"}]} in head


def test_clients_can_be_named() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"team": "web"}}}
    rendered = render(GIVEN, {"networkPolicy": {"clients": [peer]}})
    (rule,) = rendered.one("NetworkPolicy", "gateway")["spec"]["ingress"]
    assert rule["from"] == [peer]


PROMETHEUS: Json = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    "podSelector": {"matchLabels": {"app": "prometheus"}},
}


def test_who_scrapes_is_let_in_beside_the_clients_and_nobody_else() -> None:
    web = {"podSelector": {"matchLabels": {"app": "web"}}}
    policy = {"clients": [web], "monitoring": [PROMETHEUS]}
    on = {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}
    rendered = render(GIVEN, {"networkPolicy": policy, "monitoring": on})
    for target, port in (("gateway", "http"), ("controller", "http"), ("worker", "baton-metrics")):
        assert _passes(rendered, target, "ingress", "prometheus", port)
        assert not _passes(rendered, target, "ingress", "stranger", port)


def test_workers_monitored_alone_open_no_other_port() -> None:
    web = {"podSelector": {"matchLabels": {"app": "web"}}}
    over = {"networkPolicy": {"clients": [web]}, "monitoring": {"podMonitor": {"enabled": True}}}
    rendered = render(GIVEN, over)
    assert _passes(rendered, "worker", "ingress", "stranger", "baton-metrics")
    for target in ("gateway", "controller"):
        assert not _passes(rendered, target, "ingress", "stranger", "http")


def test_a_download_of_the_model_may_leave_the_cluster() -> None:
    model = {"source": "huggingFace", "huggingFace": {"repo": "a/b", "revision": "c"}}
    rendered = render(COMPLETE["values-cpu.yaml"], {"model": model})
    for pod in ("gateway", "worker"):
        assert _may(rendered, pod, "stranger", 443)
    assert not _may(rendered, "controller", "stranger", 443)


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
    assert _may(rendered, "stranger", "gateway", "http")
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


def test_names_follow_the_release() -> None:
    assert render(name="baton").one("RayCluster")["metadata"]["name"] == "baton"
    assert "ray://baton-head-svc:10001" in render(name="baton").baton_yaml
    named = render(GIVEN, {"fullnameOverride": "mine"})
    assert named.one("Service", "gateway")["metadata"]["name"] == "mine-gateway"
    # Two releases on one Redis do not meet.
    assert "cluster: baton" in render(name="baton").baton_yaml
