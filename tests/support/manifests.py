"""Rendered manifests, carried out as a kubelet would: what a container runs, and with what.

Nothing of a container is retyped here: command, environment, files and probes come out
of the manifest. What only a machine knows (addresses, folders) comes from ``Pod``.
"""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.processes import Launch, Processes

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class Manifests:
    """Every object of a rendering."""

    def __init__(self, text: str) -> None:
        self.objects: list[dict[str, Any]] = [each for each in yaml.safe_load_all(text) if each]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str, name: str = "") -> dict[str, Any]:
        """The only one of that kind, or the one of that name. AssertionError for none."""
        found = [each for each in self.all(kind) if name in ("", each["metadata"]["name"])]
        names = [each["metadata"]["name"] for each in self.all(kind)]
        assert len(found) == 1, f"{kind} {name!r} among {names}"
        return found[0]

    def data(self, kind: str, name: str) -> dict[str, str]:
        """Of a ConfigMap or a Secret, decoded."""
        thing = self.one(kind, name)
        decoded = dict(thing.get("stringData", {}))
        for key, value in thing.get("data", {}).items():
            decoded[key] = base64.b64decode(value).decode() if kind == "Secret" else value
        return decoded

    def component(self, kind: str, component: str) -> dict[str, Any]:
        """The only one of that kind with that label ``app.kubernetes.io/component``."""
        label = "app.kubernetes.io/component"
        found = [x for x in self.all(kind) if x["metadata"]["labels"].get(label) == component]
        assert len(found) == 1, f"{kind} of component {component!r}"
        return found[0]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` as Kubernetes expands it: ``$$`` is a dollar sign, and a name that is
    not known stays as it is written."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(replace, text)


@dataclass(slots=True)
class Pod:
    """A pod of a manifest on this machine. Its volumes are folders below ``folder``."""

    manifests: Manifests
    template: Mapping[str, Any]
    """``metadata`` and ``spec``."""
    name: str
    folder: Path
    image: Mapping[str, str] = field(default_factory=dict)
    """What ENV sets in its image, with ``PATH`` leading to the image's programs."""
    entrypoint: Sequence[str] = ()
    volumes: Mapping[str, Path] = field(default_factory=dict)
    """Volumes that lie elsewhere, by name."""
    services: Mapping[str, str] = field(default_factory=dict)
    """``host:port`` of a Service → where that is on this machine: its DNS."""
    namespace: str = "default"
    ip: str = "127.0.0.1"

    @property
    def spec(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.template["spec"]
        return spec

    @property
    def grace_s(self) -> float:
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    def container(self, index: int = 0) -> Mapping[str, Any]:
        container: Mapping[str, Any] = self.spec["containers"][index]
        return container

    # -------------------------------------------------------------- environment

    def environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """Of a container, as it is on this machine: its image's, then envFrom's, then env's."""
        own = dict(self.image)
        for name, value in self._declared(container).items():
            own[name] = self.on_machine(container, value)
        if "/tmp" in (mounts := self.mounts(container)):  # where it would look by itself
            own |= {"TMPDIR": str(mounts["/tmp"]), "RAY_TMPDIR": str(mounts["/tmp"])}
        return own

    def _declared(self, container: Mapping[str, Any]) -> dict[str, str]:
        """What the manifest says of its environment."""
        own: dict[str, str] = {}
        for source in container.get("envFrom", []):
            own |= self._env_from(source)
        for entry in container.get("env", []):
            value = self._value(entry)
            if value is not None:
                own[entry["name"]] = value if "valueFrom" in entry else expanded(value, own)
        return own

    def _env_from(self, source: Mapping[str, Any]) -> dict[str, str]:
        kind, key = (
            ("Secret", "secretRef") if "secretRef" in source else ("ConfigMap", "configMapRef")
        )
        prefix = source.get("prefix", "")
        data = self.manifests.data(kind, source[key]["name"])
        return {prefix + name: value for name, value in data.items()}

    def _value(self, entry: Mapping[str, Any]) -> str | None:
        if "valueFrom" not in entry:
            return str(entry.get("value", ""))
        ((kind, reference),) = entry["valueFrom"].items()
        if kind == "fieldRef":
            return self._field(reference["fieldPath"])
        what = {"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[kind]
        try:
            return self.manifests.data(what, reference["name"])[reference["key"]]
        except (AssertionError, KeyError):
            assert reference.get("optional"), f"{entry['name']}: there is no {reference}"
            return None

    def _field(self, path: str) -> str:
        labels = self.template["metadata"].get("labels", {})
        if match := re.fullmatch(r"metadata\.labels\['(.*)'\]", path):
            return str(labels.get(match[1], ""))
        return {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "status.podIP": self.ip,
            "status.hostIP": self.ip,
            "spec.nodeName": "this-machine",
        }[path]

    # -------------------------------------------------------------------- files

    def mounts(self, container: Mapping[str, Any]) -> dict[str, Path]:
        """Path in the container → where that lies on this machine, with its content."""
        return {
            mount["mountPath"]: self._volume(mount["name"]) / mount.get("subPath", "")
            for mount in container.get("volumeMounts", [])
            if mount["mountPath"] != "/dev/shm"  # every process of this machine has one
        }

    def _volume(self, name: str) -> Path:
        if name in self.volumes:
            return self.volumes[name]
        (volume,) = [each for each in self.spec["volumes"] if each["name"] == name]
        folder = self.folder / name
        if folder.exists():
            return folder
        folder.mkdir(parents=True)
        for kind, key, reference in (
            ("ConfigMap", "configMap", "name"),
            ("Secret", "secret", "secretName"),
        ):
            if key in volume:
                data = self.manifests.data(kind, volume[key][reference])
                for item in volume[key].get("items", [{"key": k, "path": k} for k in data]):
                    (folder / item["path"]).write_text(self._resolved(data[item["key"]]))
                return folder
        assert "emptyDir" in volume, f"volume {name} is none that can be had here: {volume}"
        return folder

    def on_machine(self, container: Mapping[str, Any], text: str) -> str:
        """``text`` with every path in a volume, and every Service, replaced by where that is."""
        text = self._resolved(text)
        mounts = self.mounts(container)
        if not mounts:
            return text
        longest_first = sorted(mounts, key=len, reverse=True)
        paths = "|".join(re.escape(path) for path in longest_first)
        pattern = re.compile(rf"(?<![\w./-])({paths})(?![\w.-])")
        return pattern.sub(lambda match: str(mounts[match[1]]), text)

    def _resolved(self, text: str) -> str:
        for service, address in self.services.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(service)}(?!\w)", address, text)
        return text

    # ------------------------------------------------------------------ running

    def launch(self, container: Mapping[str, Any]) -> Launch:
        """The container's own process."""
        command = container.get("command") or list(self.entrypoint)
        return self.launch_of(container, [*command, *container.get("args", [])])

    def launch_of(self, container: Mapping[str, Any], command: Sequence[str]) -> Launch:
        """``command`` in that container."""
        declared = self._declared(container)
        words = [self.on_machine(container, expanded(str(word), declared)) for word in command]
        return Launch(words, self.environment(container))

    def probe(self, container: Mapping[str, Any], kind: str, running: Processes) -> bool:
        """Carries one of its probes out, once."""
        probe = container[kind]
        timeout_s = float(probe.get("timeoutSeconds", 1))
        if "exec" in probe:
            launch = self.launch_of(container, probe["exec"]["command"])
            return running.run(launch, timeout_s=timeout_s).returncode == 0
        if "tcpSocket" in probe:
            address = (self.ip, self.port(container, probe["tcpSocket"]["port"]))
            try:
                socket.create_connection(address, timeout_s).close()
            except OSError:
                return False
            return True
        asked = probe["httpGet"]
        url = f"http://{self.ip}:{self.port(container, asked['port'])}{asked.get('path', '/')}"
        try:
            return 200 <= httpx.get(url, timeout=timeout_s).status_code < 400
        except httpx.TransportError:
            return False

    def port(self, container: Mapping[str, Any], port: int | str) -> int:
        """A port's number by its name in the container, or as it is."""
        if isinstance(port, int):
            return port
        names = {each.get("name"): each["containerPort"] for each in container.get("ports", [])}
        return int(names[port])

    def pre_stop(self, container: Mapping[str, Any]) -> Launch:
        """What runs in the container before it gets its SIGTERM."""
        return self.launch_of(container, container["lifecycle"]["preStop"]["exec"]["command"])


def probes_of(container: Mapping[str, Any]) -> Iterator[str]:
    """Which of the three probes a container has."""
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if kind in container:
            yield kind
