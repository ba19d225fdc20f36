"""The rules that every rendering has to keep: what broke the clusters of others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.chart import COMPLETE, GIVEN, Rendered, render

Json = dict[str, Any]

AUTOSCALED: Json = {"ray": {"autoscaling": {"enabled": True}}}

every_values_file = pytest.mark.parametrize("name", COMPLETE)


@every_values_file
@pytest.mark.parametrize("over", [{}, AUTOSCALED])
def test_worker_pods_never_restart_in_place(name: str, over: Json) -> None:
    rendered = render(COMPLETE[name], over)
    for group in rendered.ray["workerGroupSpecs"]:
        assert group["template"]["spec"]["restartPolicy"] == "Never"


def test_the_head_suits_the_autoscaler() -> None:
    """KubeRay refuses version 2 of the autoscaler with a head that restarts in place."""
    head = render(GIVEN, AUTOSCALED).ray["headGroupSpec"]["template"]["spec"]
    assert head["restartPolicy"] == "Never"
    assert head["automountServiceAccountToken"] is True


@every_values_file
def test_the_head_has_no_cpus_for_workers(name: str) -> None:
    assert render(COMPLETE[name]).ray["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@every_values_file
def test_ray_start_parameters_are_strings(name: str) -> None:
    ray = render(COMPLETE[name]).ray
    for group in (ray["headGroupSpec"], *ray["workerGroupSpecs"]):
        assert group["rayStartParams"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_large_ray_start_parameters_are_whole_numbers() -> None:
    ray = render(GIVEN, {"ray": {"objectStoreBytes": 8589934592}}).ray
    assert ray["headGroupSpec"]["rayStartParams"]["object-store-memory"] == "8589934592"


@every_values_file
def test_a_pool_asks_for_what_its_nodes_offer(name: str) -> None:
    """One worker fits each pod, and no worker of one pool fits another pool's."""
    rendered = render(COMPLETE[name])
    for group in rendered.ray["workerGroupSpecs"]:
        text = group["rayStartParams"]["resources"]
        # As KubeRay's shell and the Ray autoscaler both read it: JSON in a pair of quotes.
        assert (text[0], text[-1]) == ("'", "'")
        assert json.loads(text[1:-1]) == {f"baton-pool-{group['groupName']}": 1}


def _worker_grace(group: Json) -> tuple[float, float]:
    """The pod's grace period and the time that its preStop hook may take."""
    spec = group["template"]["spec"]
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:4] == ["python", "-m", "baton.worker.leave", "--timeout-s"]
    return spec["terminationGracePeriodSeconds"], float(command[4])


@every_values_file
@pytest.mark.parametrize("drain_s", [0, 0.5, 45, 3600])
def test_worker_pods_have_time_to_drain(name: str, drain_s: float) -> None:
    pools = {pool: {"drainSeconds": drain_s} for pool in ("prefill", "decode")}
    for group in render(COMPLETE[name], {"pools": pools}).ray["workerGroupSpecs"]:
        grace_s, leave_s = _worker_grace(group)
        assert leave_s >= drain_s + 5
        assert grace_s >= leave_s + 15


@every_values_file
@pytest.mark.parametrize(("drain_s", "pre_stop_s"), [(0, 0), (10.5, 5), (600, 30)])
def test_gateway_pods_have_time_to_drain(name: str, drain_s: float, pre_stop_s: int) -> None:
    over = {"config": {"gateway": {"drain_s": drain_s}}, "gateway": {"preStopSeconds": pre_stop_s}}
    spec = render(COMPLETE[name], over).one("Deployment", "gateway")["spec"]["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == ["sleep", str(pre_stop_s)]
    assert spec["terminationGracePeriodSeconds"] >= pre_stop_s + drain_s + 9


@every_values_file
def test_gpus_cover_the_parallel_degree(name: str) -> None:
    rendered = render(COMPLETE[name])
    tensor = 4 if "h100" in name else 1
    for group in rendered.ray["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = limits.get("nvidia.com/gpu", "0")
        assert group["rayStartParams"]["num-gpus"] == gpus
        assert tensor == 1 or int(gpus) >= tensor


@pytest.mark.parametrize(("name", "suffix"), [("given", "-cuda"), ("values-cpu.yaml", "-cpu")])
def test_images_are_of_the_charts_version(name: str, suffix: str) -> None:
    rendered = render(COMPLETE[name])
    images = {spec["containers"][0]["image"] for _, spec in rendered.pod_specs()}
    assert images - {"docker.io/library/redis:7.4-alpine"} == {
        "baton-gateway:0.1.0",
        f"baton-worker:0.1.0{suffix}",
    }


@every_values_file
def test_the_gcs_outlives_its_head(name: str) -> None:
    rendered = render(COMPLETE[name])
    options = rendered.ray["gcsFaultToleranceOptions"]
    assert options["redisAddress"].startswith("redis://")
    # A Redis of its own: the GCS gives up when it is away.
    environment = rendered.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]
    addresses = [each.get("value", "") for each in environment["env"]]
    assert not any(options["redisAddress"].removeprefix("redis://") in each for each in addresses)


def test_the_password_of_rays_redis_is_given_by_reference() -> None:
    """KubeRay makes flags of rayStartParams and refuses its environment variables in the pod. From
    the reference it makes a flag all the same, of the head's own (docs/deploy.md)."""
    rendered = render(COMPLETE["values-cpu.yaml"])
    head = rendered.ray["headGroupSpec"]
    reference = rendered.ray["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert reference["secretKeyRef"] == {"name": "chat-baton-secrets", "key": "ray-redis-password"}
    assert "redis-password" not in head["rayStartParams"]
    names = {each["name"] for each in head["template"]["spec"]["containers"][0]["env"]}
    assert not names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"}


@every_values_file
def test_ray_asks_for_a_token(name: str) -> None:
    rendered = render(COMPLETE[name])
    options = rendered.ray["authOptions"]
    assert options["mode"] == "token"
    # KubeRay wants to know the version: token authentication came with Ray 2.52.
    assert rendered.ray["rayVersion"] == "2.60.0"
    controller = rendered.one("Deployment", "controller")["spec"]["template"]["spec"]
    env = {each["name"]: each for each in controller["containers"][0]["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": options["secretName"],
        "key": "auth_token",
    }


def test_rdma_is_there_or_the_pod_is_not() -> None:
    """Never a silent fall to TCP: the device is a limit of the pod, and UCX knows no TCP."""
    rendered = render(COMPLETE["values-h100-rdma.yaml"])
    for pool in ("prefill", "decode"):
        worker = rendered.worker(pool)
        for side in ("requests", "limits"):
            assert worker["resources"][side]["rdma/rdma_shared_device_a"] == "1"
        (transports,) = (e["value"] for e in worker["env"] if e["name"] == "UCX_TLS")
        assert "rc" in transports.split(",")
        assert not {"tcp", "all"} & set(transports.split(","))
        assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_a_pool_may_ask_for_more_cards_than_others() -> None:
    """One key of its RDMA, and the others by default."""
    over = {"pools": {"decode": {"rdma": {"count": 2}}}}
    rendered = render(COMPLETE["values-h100-rdma.yaml"], over)
    counts = {
        pool: rendered.worker(pool)["resources"]["limits"]["rdma/rdma_shared_device_a"]
        for pool in ("prefill", "decode")
    }
    assert counts == {"prefill": "1", "decode": "2"}


def test_workers_without_rdma_have_nothing_of_it() -> None:
    worker = render().worker()
    assert "UCX_TLS" not in {each["name"] for each in worker["env"]}
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@every_values_file
def test_probes_do_not_need_rays_dashboard(name: str) -> None:
    """KubeRay's own ask an HTTP server that only ray[default] brings; so every one is given."""
    rendered = render(COMPLETE[name])
    groups = (rendered.ray["headGroupSpec"], *rendered.ray["workerGroupSpecs"])
    for group in groups:
        container = group["template"]["spec"]["containers"][0]
        port = "port" if group is groups[0] else "node-manager-port"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["tcpSocket"]["port"] == int(group["rayStartParams"][port])


def _container(rendered: Rendered, pod: str) -> Json:
    container: Json = dict(rendered.pod_specs())[pod]["containers"][0]
    return container


PROBED: dict[str, tuple[str, Json]] = {
    "decode": ("poolDefaults", {"tcpSocket": {"port": 6380}}),
    "head": ("ray.head", {"tcpSocket": {"port": 6379}}),
    "chat-baton-gateway": ("gateway", {"httpGet": {"path": "/health", "port": "http"}}),
    "chat-baton-controller": ("controller", {"httpGet": {"path": "/health", "port": "http"}}),
}
"""By pod: where its values are, and what its startup probe asks."""


@pytest.mark.parametrize("pod", PROBED)
def test_keys_of_a_probe_go_over_the_charts(pod: str) -> None:
    path, asks = PROBED[pod]

    def probe(given: Json) -> Json:
        values: Json = {"startupProbe": given}
        for key in reversed(path.split(".")):
            values = {key: values}
        found: Json = _container(render(GIVEN, values), pod)["startupProbe"]
        return found

    own = probe({})
    assert asks.items() <= own.items()
    assert probe({"failureThreshold": 600}) == {**own, "failureThreshold": 600}
    # Another question takes the place of the chart's: Kubernetes wants one.
    asked = {"exec": {"command": ["true"]}}
    assert probe(asked) == {k: v for k, v in own.items() if k not in asks} | asked


@every_values_file
def test_pods_are_confined(name: str) -> None:
    rendered = render(COMPLETE[name])
    autoscaled = rendered.ray["enableInTreeAutoscaling"]
    for pod, spec in rendered.pod_specs():
        assert spec["automountServiceAccountToken"] is (autoscaled and pod == "head"), pod
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert "ALL" in context["capabilities"]["drop"]
            # With a root that cannot be written to, whoever writes needs this.
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


@every_values_file
def test_the_chart_grants_no_rights(name: str) -> None:
    """Only the autoscaler needs any, and KubeRay binds it a Role of its own making."""
    rendered = render(COMPLETE[name], AUTOSCALED)
    kinds = {document["kind"] for document in rendered.documents}
    assert not {kind for kind in kinds if "Role" in kind}
    accounts = {each["metadata"]["name"] for each in rendered.all("ServiceAccount")}
    used = {spec["serviceAccountName"] for _, spec in rendered.pod_specs()}
    assert used == accounts
    for account in rendered.all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_the_hpa_alone_owns_the_gateways_number() -> None:
    scaled = render(GIVEN, {"gateway": {"autoscaling": {"enabled": True}}})
    assert "replicas" not in scaled.one("Deployment", "gateway")["spec"]
    hpa = scaled.one("HorizontalPodAutoscaler")["spec"]
    assert hpa["scaleTargetRef"]["name"] == scaled.one("Deployment", "gateway")["metadata"]["name"]
    assert render().one("Deployment", "gateway")["spec"]["replicas"] == 2
    assert render().all("HorizontalPodAutoscaler") == []


def test_there_is_one_controller_at_a_time() -> None:
    spec = render().one("Deployment", "controller")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def _budgets(*over: Json) -> dict[str, Json]:
    """The disruption budget of each pool that has one."""
    return {
        each["spec"]["selector"]["matchLabels"]["baton.dev/pool"]: each["spec"]
        for each in render(GIVEN, *over).all("PodDisruptionBudget")
        if "pool" in each["metadata"]["name"]
    }


@pytest.mark.parametrize(("replicas", "least"), [(0, None), (1, None), (2, 1), (5, 4)])
def test_a_drained_node_takes_one_worker_of_a_pool_at_a_time(
    replicas: int, least: int | None
) -> None:
    """minAvailable: with maxUnavailable Kubernetes would ask the RayCluster for its scale."""
    budgets = _budgets({"pools": {"prefill": {"replicas": replicas}}})
    assert budgets.keys() == ({"prefill"} if least else set())
    for budget in budgets.values():
        assert budget["minAvailable"] == least
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert "maxUnavailable" not in budget


def test_the_autoscalers_budget_is_right_for_every_size_that_it_may_choose() -> None:
    """A share of the size at some time would forbid all evictions once the pool is smaller."""
    pools = {"decode": {"replicas": 6, "minReplicas": 3}, "prefill": {"replicas": 4}}
    budgets = _budgets(AUTOSCALED, {"pools": pools})
    assert {name: budget["minAvailable"] for name, budget in budgets.items()} == {"decode": 2}


def test_a_gateway_that_does_not_come_up_holds_no_drain() -> None:
    budget = render().one("PodDisruptionBudget", "baton-gateway")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_a_pool_that_may_lose_no_pod_keeps_them_all() -> None:
    """One key of the budget, and the other by default."""
    none = {"replicas": 3, "podDisruptionBudget": {"maxUnavailable": 0}}
    assert _budgets({"pools": {"decode": none}})["decode"]["minAvailable"] == 3


def _environment(rendered: Rendered, pod: str) -> dict[str, Json]:
    spec = dict(rendered.pod_specs())[pod]
    return {each["name"]: each for each in spec["containers"][0]["env"]}


def test_workers_are_told_of_their_pod_and_of_no_secret() -> None:
    env = _environment(render(COMPLETE["values-cpu.yaml"]), "decode")
    assert env["BATON_ADVERTISE_HOST"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert env["BATON_RUN_DIR"]["value"] == "/run/baton"
    assert not any("secretKeyRef" in str(each) for each in env.values())


def test_the_controller_hands_no_place_of_its_own_to_workers() -> None:
    """It passes its BATON_ variables on to the workers that it starts."""
    env = _environment(render(COMPLETE["values-cpu.yaml"]), "chat-baton-controller")
    own = {name for name in env if name.startswith("BATON_")}
    assert own == {"BATON_SECRET", "BATON_CONTROLLER_TOKEN"}


@pytest.mark.parametrize("name", ["chat-baton-gateway", "chat-baton-controller"])
def test_variables_are_defined_before_they_are_used(name: str) -> None:
    """Kubernetes expands $(NAME) with what stands above alone."""
    spec = dict(render(COMPLETE["values-cpu.yaml"]).pod_specs())[name]
    order = [each["name"] for each in spec["containers"][0]["env"]]
    assert order.index("REDIS_PASSWORD") < order.index("REDIS_URL")
    (url,) = (e["value"] for e in spec["containers"][0]["env"] if e["name"] == "REDIS_URL")
    assert url == "redis://:$(REDIS_PASSWORD)@chat-baton-redis:6379/0"


def test_commands_are_the_processes_of_baton() -> None:
    rendered = render()
    gateway = rendered.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]
    assert gateway["command"] + gateway["args"] == [
        *("python", "-m", "router.main", "--config", "/etc/baton/baton.yaml"),
        *("--gateway-id", "$(POD_NAME)", "--host", "0.0.0.0"),
    ]
    controller = rendered.one("Deployment", "controller")["spec"]["template"]["spec"]
    container = controller["containers"][0]
    assert container["command"] + container["args"] == [
        *("python", "-m", "cluster.controller_main", "--config", "/etc/baton/baton.yaml"),
    ]
    for spec in (gateway, container):
        paths = {p: spec[p]["httpGet"]["path"] for p in spec if p.endswith("Probe")}
        assert paths == {
            "startupProbe": "/health",
            "livenessProbe": "/health",
            "readinessProbe": "/ready",
        }
    # KubeRay writes those of Ray's pods; a command here would stand before `ray start`.
    for _, spec in list(rendered.pod_specs())[2:]:
        assert not {"command", "args"} & set(spec["containers"][0])
