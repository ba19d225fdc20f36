"""What stands for kubelet and KubeRay in the tests of the pods does as they do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import kuberay
from support.manifests import Manifests, Pod, expanded
from support.processes import Launch, base_environment, processes

from cluster.procfs import is_alive

SECRET = {"kind": "Secret", "metadata": {"name": "s"}, "data": {"token": "YWJj"}}
CONFIG = {"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a.yaml": "url: http://db:80/x"}}


def pod(tmp_path: Path, container: dict[str, Any], **more: Any) -> Pod:
    volumes = [
        {"name": "config", "configMap": {"name": "c"}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "claim", "persistentVolumeClaim": {"claimName": "x"}},
    ]
    template = {
        "metadata": {"labels": {"pool": "decode"}},
        "spec": {"containers": [container], "volumes": volumes},
    }
    manifests = Manifests(yaml.safe_dump_all([SECRET, CONFIG]))
    return Pod(manifests, template, name="p-1", folder=tmp_path / "pod", **more)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("--id=$(NAME)", "--id=x"),
        ("$(NOBODY)", "$(NOBODY)"),
        ("$$(NAME)", "$(NAME)"),
        ("$NAME ${NAME}", "$NAME ${NAME}"),
    ],
)
def test_references_to_variables_are_expanded_as_kubernetes_does(text: str, result: str) -> None:
    assert expanded(text, {"NAME": "x"}) == result


def test_environment_is_the_images_then_the_manifests(tmp_path: Path) -> None:
    env = [
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}},
        {"name": "URL", "value": "redis://:$(TOKEN)@db:80"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "POOL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pool']"}}},
        {"name": "OURS", "value": "manifest"},
        {"name": "LATER", "value": "$(LAST)"},
        {"name": "LAST", "value": "1"},
    ]
    container = {"env": env}
    own = pod(tmp_path, container, image={"OURS": "image", "PATH": "/tmp/x"}, ip="127.0.0.9")
    own.services = {"db:80": "127.0.0.1:81"}
    assert own.environment(container) == {
        "PATH": "/tmp/x",
        "TOKEN": "abc",
        "URL": "redis://:abc@127.0.0.1:81",
        "IP": "127.0.0.9",
        "POOL": "decode",
        "OURS": "manifest",
        "LATER": "$(LAST)",
        "LAST": "1",
    }


def test_secret_that_is_missing_is_an_error_unless_it_is_optional(tmp_path: Path) -> None:
    reference: dict[str, Any] = {"name": "s", "key": "nobody"}
    container = {"env": [{"name": "X", "valueFrom": {"secretKeyRef": reference}}]}
    with pytest.raises(AssertionError, match="X: there is no"):
        pod(tmp_path, container).environment(container)
    reference["optional"] = True
    assert "X" not in pod(tmp_path, container).environment(container)


def test_paths_in_volumes_lead_to_their_content_here(tmp_path: Path) -> None:
    mounts = [
        {"name": "config", "mountPath": "/etc/baton"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    container = {"command": ["run", "--config=/etc/baton/a.yaml", "/etc/baton-x", "/tmp"]}
    container |= {"volumeMounts": mounts}  # type: ignore[dict-item]
    own = pod(tmp_path, container, services={"db:80": "127.0.0.1:81"})
    launch = own.launch(container)
    _, config, other, scratch = launch.arguments
    assert Path(config.removeprefix("--config=")).read_text() == "url: http://127.0.0.1:81/x"
    assert other == "/etc/baton-x"
    assert Path(scratch) == tmp_path / "pod" / "tmp"
    assert launch.environment["TMPDIR"] == scratch


def test_volume_that_no_machine_has_by_itself_is_an_error(tmp_path: Path) -> None:
    container = {"volumeMounts": [{"name": "claim", "mountPath": "/models"}]}
    with pytest.raises(AssertionError, match="volume claim is none that can be had here"):
        pod(tmp_path, container).mounts(container)


def test_container_without_a_command_runs_its_images(tmp_path: Path) -> None:
    container = {"args": ["--x", "$(A)"], "env": [{"name": "A", "value": "1"}]}
    own = pod(tmp_path, container, entrypoint=["python", "-m", "m"])
    assert list(own.launch(container).arguments) == ["python", "-m", "m", "--x", "1"]


def test_probes_are_carried_out(tmp_path: Path) -> None:
    container = {
        "ports": [{"name": "http", "containerPort": 9}],
        "livenessProbe": {"exec": {"command": [sys.executable, "-c", "raise SystemExit(0)"]}},
        "readinessProbe": {"exec": {"command": [sys.executable, "-c", "raise SystemExit(1)"]}},
        "startupProbe": {"httpGet": {"port": "http", "path": "/"}, "timeoutSeconds": 1},
    }
    own = pod(tmp_path, container)
    with processes(tmp_path) as running:
        assert own.probe(container, "livenessProbe", running)
        assert not own.probe(container, "readinessProbe", running)
        assert not own.probe(container, "startupProbe", running)
    assert own.port(container, "http") == 9


def test_ray_start_has_the_flags_that_kuberay_writes() -> None:
    parameters = {
        "num-cpus": "0",
        "block": "true",
        "no-monitor": "false",
        "include-dashboard": "false",
        "resources": "'{\"a\":1}'",
    }
    assert kuberay.flags(parameters) == (
        "--block --include-dashboard=false --num-cpus=0 --resources='{\"a\":1}'"
    )


def test_workers_pod_is_kuberays_own(tmp_path: Path) -> None:
    container = {"name": "ray-worker", "resources": {"limits": {"cpu": "1500m", "memory": "1Gi"}}}
    group = {
        "groupName": "g",
        "rayStartParams": {},
        "template": {"spec": {"containers": [container]}},
    }
    cluster = {
        "metadata": {"name": "r"},
        "spec": {
            "authOptions": {"mode": "token"},
            "headGroupSpec": {"rayStartParams": {"port": "6380"}},
            "workerGroupSpecs": [group],
        },
    }
    built = kuberay.worker_pod(cluster, "g", head_host="head.svc")
    (ray,) = built["spec"]["containers"]
    assert ray["args"] == [
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --address=head.svc:6380 "
        "--block --dashboard-agent-listen-port=52365 --memory=1073741824 "
        "--metrics-export-port=8080 --num-cpus=2"
    ]
    variables = {entry["name"]: entry for entry in ray["env"]}
    assert variables["RAY_ADDRESS"]["value"] == "head.svc:6380"
    secret = {"secretKeyRef": {"name": "r", "key": "auth_token"}}
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"] == secret
    assert "rayStartParams" in group
    assert group["rayStartParams"] == {}, "the manifest itself stays as it is"
    assert (
        "ray health-check --address head.svc:6380" in built["spec"]["initContainers"][0]["args"][0]
    )


def test_nothing_that_was_started_is_left_and_orphans_neither(tmp_path: Path) -> None:
    orphan = "import subprocess as s; s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL)"
    with processes(tmp_path) as running:
        environment = base_environment()
        running.start("lives", Launch(["sleep", "60"], environment))
        done = running.run(Launch([sys.executable, "-c", orphan], environment), timeout_s=20)
        assert done.returncode == 0
        found = running.living()
        assert len(found) == 2
        with pytest.raises(AssertionError, match="ended, 3"):
            running.start("ends", Launch(["sh", "-c", "exit 3"], environment))
            running._running["ends"].wait()
            running.check_alive()
    assert not running.living()
    assert not any(is_alive(name) for name in found)


def test_process_that_ignores_its_end_is_reported(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(60)"
    )
    with processes(tmp_path) as running:
        running.start("deaf", Launch([sys.executable, "-c", deaf], base_environment()))
        while "deaf" not in running.log("deaf"):
            running.check_alive()
        with pytest.raises(AssertionError, match="deaf did not end"):
            running.stop("deaf", within_s=0.3)
