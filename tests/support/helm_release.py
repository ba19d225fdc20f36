"""A Helm release on the fake API server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import helm_python as helm
from helm_python import _native
from support.chart import CHART
from support.fake_kubernetes import FakeKubernetes, fake_kubernetes

Json = dict[str, Any]


class Release:
    """The release ``chat`` in the namespace ``llm``."""

    def __init__(self, config: helm.Config, cluster: FakeKubernetes) -> None:
        self._config = config
        self.cluster = cluster

    def install(self, values: Json, **options: Any) -> Json:
        return self._act("helm_install", values, options)

    def upgrade(self, values: Json, **options: Any) -> Json:
        """``options`` are those of `helm upgrade`: force_conflicts, server_side_apply."""
        return self._act("helm_upgrade", values, options)

    def _act(self, action: str, values: Json, options: Json) -> Json:
        # Config.install and Config.upgrade leave some of Helm's options out.
        with helm.Chart.load(CHART) as chart:
            answer = _native.call_string(
                action,
                self._config._raw(),
                self._config._context_arg(None),
                chart._raw(),
                None,
                "chat",
                json.dumps(values),
                json.dumps({"namespace": "llm", **options}),
            )
        result: Json = json.loads(answer)
        return result

    def roll_back(self, version: int) -> None:
        self._config.rollback("chat", version=version)

    def uninstall(self) -> None:
        self._config.uninstall("chat")

    @property
    def history(self) -> list[Json]:
        return list(self._config.history("chat"))

    def replicas(self) -> dict[str, int]:
        """Of each worker group of the live RayCluster."""
        ray = self.cluster.find("RayCluster", "chat-baton")
        return {group["groupName"]: group["replicas"] for group in ray["spec"]["workerGroupSpecs"]}

    def scale(self, pool: str, replicas: int, *, leaving: tuple[str, ...] = ()) -> None:
        """What the Ray autoscaler does: it patches a group's size, and says who goes."""
        index = list(self.replicas()).index(pool)
        at = f"/spec/workerGroupSpecs/{index}"
        operations: list[Json] = [
            {"op": "replace", "path": f"{at}/replicas", "value": replicas},
        ]
        if leaving:
            strategy = {"workersToDelete": list(leaving)}
            operations.append({"op": "add", "path": f"{at}/scaleStrategy", "value": strategy})
        self.cluster.patch("RayCluster", "chat-baton", operations, manager="python-requests")


@contextmanager
def release() -> Iterator[Release]:
    with (
        fake_kubernetes() as (cluster, kubeconfig),
        helm.Config(
            kubeconfig_content=kubeconfig,
            namespace="llm",
            storage_driver="memory",
            qps=1000,
            burst_limit=1000,
        ) as config,
    ):
        yield Release(config, cluster)
