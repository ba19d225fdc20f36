"""Who may talk to whom, by the rendered network policies."""

from __future__ import annotations

from typing import Any

import pytest
from support.chart import COMPLETE, GIVEN, Rendered, render

Json = dict[str, Any]

# Labels as the pods have them, KubeRay's own included.
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
    model = {"source": "huggingFace", "huggingFace": {"repo": "a/b", "revision": "c" * 40}}
    rendered = render(COMPLETE["values-cpu.yaml"], {"model": model})
    for pod in ("gateway", "worker"):
        assert _may(rendered, pod, "stranger", 443)
    assert not _may(rendered, "controller", "stranger", 443)


def test_a_monitor_alone_shuts_no_client_out() -> None:
    on = {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}
    rendered = render(COMPLETE["values-cpu.yaml"], {"monitoring": on})
    assert _may(rendered, "stranger", "gateway", "http")
