"""A release of the chart on this machine: every pod of its manifests, as processes on loopback."""

from __future__ import annotations

import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import kuberay
from support.chart import COMPLETE, Rendered, merged, render
from support.images import Image, image_of, on_loopback, redis_image
from support.installed import Installed
from support.manifests import Manifests, Pod, probes_of
from support.processes import Processes, processes
from support.server import wait_until

from baton.checkpoint.cache import cache_root

RELEASE = "chat"
POOLS = ("prefill", "decode")
READY_S = 120.0


def free_ports(number: int) -> Iterator[int]:
    """Ports that nobody listens on, apart from those that the kernel and Ray give out."""
    found: set[int] = set()
    while len(found) < number:
        port = random.randrange(25_000, 32_000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.add(port)
    yield from found


def loopback_values() -> dict[str, Any]:
    """Over values-cpu.yaml: one machine has one loopback address for all pods, where each
    pod would have its own, so they get ports of their own."""
    ports = free_ports(20)
    node = {"node-ip-address": "127.0.0.1"}

    def pool() -> dict[str, Any]:
        start = {
            "node-manager-port": str(next(ports)),
            "object-manager-port": str(next(ports)),
            "metrics-export-port": str(next(ports)),
            "dashboard-agent-listen-port": str(next(ports)),
        }
        return {
            "rayStartParams": {**node, **start},
            "worker": {"port": next(ports), "metrics_port": next(ports)},
        }

    return {
        "config": {
            "gateway": {"port": next(ports)},
            "controller": {"port": next(ports)},
            "engine": {"threads": 1, "kv_cache_bytes": 128 * 1024 * 1024, "dtype": "float32"},
        },
        "pools": {name: pool() for name in POOLS},
        "gateway": {"preStopSeconds": 1},
        "ray": {
            "ports": {
                name: next(ports)
                for name in ("gcs", "client", "nodeManager", "objectManager", "metrics")
            },
            "head": {"rayStartParams": node},
        },
    }


class Release:
    """Its pods by name: redis, ray-redis, head, prefill, decode, controller, gateway."""

    def __init__(self, folder: Path, installed: Installed, running: Processes) -> None:
        self.folder = folder
        self.running = running
        self._installed = installed
        values = merged(COMPLETE["values-cpu.yaml"], loopback_values())
        self.rendered: Rendered = render(values, name=RELEASE)
        self.manifests = Manifests(self.rendered.text)
        self.cluster = self.manifests.one("RayCluster")
        self._services, self._images = self._outside()
        self.home = folder / "home"
        self.home.mkdir()
        self.pods = {
            name: self._pod(name, template) for name, template in self._templates().items()
        }

    def _outside(self) -> tuple[dict[str, str], dict[str, Image]]:
        """Where the Services are on this machine, and what Redis is made of."""
        services, images = {}, {}
        for component in ("redis", "ray-redis"):
            name = self.manifests.component("StatefulSet", component)["metadata"]["name"]
            (port,) = free_ports(1)
            services[f"{name}:6379"] = f"127.0.0.1:{port}"
            images[component] = redis_image(self.folder / f"{component}-image", port)
        client = self.cluster["spec"]["headGroupSpec"]["rayStartParams"]["ray-client-server-port"]
        head = f"{self.cluster['metadata']['name']}-head-svc:{client}"  # KubeRay's name for it
        # Nothing here listens for other machines.
        return {**services, head: f"127.0.0.1:{client}", "0.0.0.0": "127.0.0.1"}, images

    def _templates(self) -> dict[str, Mapping[str, Any]]:
        found: dict[str, Mapping[str, Any]] = {}
        for kind, components in (
            ("StatefulSet", ("redis", "ray-redis")),
            ("Deployment", ("controller", "gateway")),
        ):
            for component in components:
                thing = self.manifests.component(kind, component)
                found[component] = thing["spec"]["template"]
        found["head"] = kuberay.head_pod(self.cluster)
        for pool in POOLS:
            found[pool] = kuberay.worker_pod(self.cluster, pool, head_host="127.0.0.1")
        return found

    def _pod(self, name: str, template: Mapping[str, Any]) -> Pod:
        reference = template["spec"]["containers"][0]["image"]
        image = self._images.get(name) or image_of(reference, self._installed, self.home)
        if name in ("head", *POOLS):
            image = on_loopback(image, self.folder / f"{name}-image")
        return Pod(
            self.manifests,
            template,
            name=f"{RELEASE}-{name}-x",
            folder=self.folder / name,
            image=image.environment,
            entrypoint=image.entrypoint,
            volumes={"cache": cache_root()},
            services=self._services,
        )

    def start(self, name: str) -> None:
        """Its init containers to their ends, then its container."""
        pod = self.pods[name]
        for init in pod.spec.get("initContainers", []):
            done = self.running.run(
                pod.launch_of(init, init["command"] + init["args"]), timeout_s=60
            )
            assert done.returncode == 0, f"{name}: {init['name']}: {done.stdout}{done.stderr}"
        self.running.start(name, pod.launch(pod.container()))

    def wait_ready(self, name: str) -> None:
        """Each of its probes, in a kubelet's order, until it succeeds."""
        pod = self.pods[name]
        for kind in probes_of(pod.container()):

            def passes(kind: str = kind) -> bool:
                self.running.check_alive()
                return pod.probe(pod.container(), kind, self.running)

            self.wait_until(passes, timeout_s=READY_S, what=f"{kind} of {name}")

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Polls ``condition``; AssertionError with all logs when it does not come true."""
        try:
            wait_until(condition, timeout_s=timeout_s, what=what, poll_s=0.2)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.running.logs()}") from None

    def url(self, name: str) -> str:
        """Of the container port that is called http."""
        pod = self.pods[name]
        return f"http://{pod.ip}:{pod.port(pod.container(), 'http')}"

    def variable(self, name: str, variable: str) -> str:
        """What a pod's container has in that variable."""
        pod = self.pods[name]
        return pod.environment(pod.container())[variable]

    def bring_up(self) -> None:
        """In an order that a cluster may have: the gateway long before it has workers."""
        for name in ("redis", "ray-redis"):
            self.start(name)
        for name in ("redis", "ray-redis"):
            self.wait_ready(name)
        self.start("gateway")
        self.start("head")
        self.wait_ready("head")
        self.start("controller")
        for name in POOLS:
            # One after the other: on one machine all nodes keep their sockets in the head's
            # folder, and two that start at once choose the same name.
            self.start(name)
            self.wait_ready(name)
        for name in ("controller", "gateway"):
            self.wait_ready(name)

    def pre_stop(self, name: str) -> float:
        """What a kubelet does first to a pod that is to end; how long it took, in seconds."""
        pod = self.pods[name]
        began = time.monotonic()
        if "lifecycle" in pod.container():
            done = self.running.run(pod.pre_stop(pod.container()), timeout_s=pod.grace_s)
            assert done.returncode == 0, f"preStop of {name}: {done.stdout}{done.stderr}"
        return time.monotonic() - began

    def terminate(self, name: str, *, after_s: float = 0.0) -> int:
        """Then: SIGTERM, and its exit status. AssertionError when it takes longer than what
        is left of its grace period ``after_s``."""
        return self.running.stop(name, within_s=self.pods[name].grace_s - after_s)

    def end(self, name: str) -> int:
        """Both."""
        return self.terminate(name, after_s=self.pre_stop(name))


@contextmanager
def release(installed: Installed) -> Iterator[Release]:
    """Up and ready; every process of it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as folder:  # short: sockets
        logs = Path(folder) / "logs"
        logs.mkdir()
        with processes(logs) as running:
            own = Release(Path(folder), installed, running)
            own.bring_up()
            yield own
