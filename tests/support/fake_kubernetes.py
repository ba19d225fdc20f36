"""A small Kubernetes API server on loopback: enough for Helm to install and upgrade a chart.

It discovers, creates, reads, patches (merge, JSON, server-side apply) and deletes. Like the
real one it replaces lists of custom resources as a whole, fills in the RayCluster's default
of 0 replicas, and refuses an apply of a field that somebody else has changed, and a change of
what a StatefulSet keeps. It has no controllers: nothing happens to what is stored.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from support.json_patches import json_patch, merge_patch

Json = dict[str, Any]
Path = tuple[str, ...]

KINDS = {
    "v1": ("ConfigMap", "Secret", "Service", "ServiceAccount", "Pod", "Namespace"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PodMonitor"),
    "ray.io/v1": ("RayCluster",),
}


def _plural(kind: str) -> str:
    name = kind.lower()
    return name[:-1] + "ies" if name.endswith("y") else name + "s"


class Refused(Exception):
    """What the server answers with a Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Fields as server-side apply owns them: a list is one, as in a CRD that says no more."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _get(value: Any, path: Path) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _put(value: Json, path: Path, leaf: Any) -> None:
    for key in path[:-1]:
        inner = value.get(key)
        if not isinstance(inner, dict):
            inner = value[key] = {}
        value = inner
    value[path[-1]] = leaf


def _drop(value: Json, path: Path) -> None:
    holder = _get(value, path[:-1])
    if isinstance(holder, dict):
        holder.pop(path[-1], None)


def _defaulted(document: Json) -> Json:
    if document.get("kind") == "RayCluster":
        for group in document["spec"].get("workerGroupSpecs", []):
            group.setdefault("replicas", 0)
    return document


_CHANGEABLE = (
    *("replicas", "ordinals", "template", "updateStrategy"),
    *("persistentVolumeClaimRetentionPolicy", "minReadySeconds"),
)


def _check_kept(before: Json, after: Json) -> None:
    """A StatefulSet keeps most of its spec, by Kubernetes' ValidateStatefulSetUpdate.

    Raises: Refused.
    """

    def kept(document: Json) -> Json:
        return {key: each for key, each in document["spec"].items() if key not in _CHANGEABLE}

    if before["kind"] == "StatefulSet" and kept(before) != kept(after):
        fields = ", ".join(f"'{key}'" for key in _CHANGEABLE)
        raise Refused(
            422,
            "Invalid",
            f"StatefulSet.apps {before['metadata']['name']!r} is invalid: spec: Forbidden: "
            f"updates to statefulset spec for fields other than {fields} are forbidden",
        )


class _Stored:
    """One object, and who owns which of its fields."""

    def __init__(self, document: Json, manager: str) -> None:
        self.document = _defaulted(document)
        self.applied: dict[str, set[Path]] = {}
        self.owners: dict[Path, set[str]] = {path: {manager} for path, _ in _spec(document)}

    def replace(self, document: Json, manager: str) -> None:
        """Raises Refused for what may not change."""
        _check_kept(self.document, document)
        before = dict(_spec(self.document))
        self.document = _defaulted(document)
        for path, leaf in _spec(self.document):
            if path not in before or before[path] != leaf:
                self.owners[path] = {manager}

    def apply(self, wanted: Json, manager: str, *, force: bool) -> None:
        """Raises Refused for fields that others have changed to something else, and for what
        may not change."""
        fields = dict(_spec(_defaulted(copy.deepcopy(wanted))))
        conflicts = {
            ".".join(path): owners
            for path, leaf in fields.items()
            if (owners := self.owners.get(path, set()) - {manager})
            and _get(self.document, path) != leaf
        }
        if conflicts and not force:
            said = ", ".join(f".{path} (owned by {sorted(by)})" for path, by in conflicts.items())
            raise Refused(409, "Conflict", f"Apply failed with conflicts: {said}")
        changed = copy.deepcopy(self.document)
        for path in self.applied.get(manager, set()) - set(fields):
            if self.owners.get(path, set()) <= {manager}:
                _drop(changed, path)
        owners = {}
        for path, leaf in fields.items():
            same = _get(changed, path) == leaf
            owners[path] = self.owners.get(path, set()) | {manager} if same else {manager}
            _put(changed, path, leaf)
        _check_kept(self.document, changed)
        self.owners |= owners
        self.applied[manager] = set(fields)
        self.document = _defaulted(changed)


def _spec(document: Json) -> Iterator[tuple[Path, Any]]:
    """The fields that somebody owns: not what the server itself writes."""
    for path, leaf in _leaves(document):
        own = path[:2] in (("metadata", "uid"), ("metadata", "resourceVersion"))
        if not own and path[0] not in ("apiVersion", "kind", "status"):
            yield path, leaf


class FakeKubernetes:
    """What the server holds. Thread-safe."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._objects: dict[Path, _Stored] = {}
        self._version = 0
        self._guard = threading.Lock()

    def find(self, kind: str, name: str, namespace: str = "llm") -> Json:
        """A copy. Raises KeyError."""
        with self._guard:
            return copy.deepcopy(self._objects[_plural(kind), namespace, name].document)

    def names(self) -> set[tuple[str, str]]:
        with self._guard:
            return {(stored.document["kind"], key[2]) for key, stored in self._objects.items()}

    def patch(self, kind: str, name: str, operations: list[Json], *, manager: str) -> None:
        """What the Ray autoscaler and kubectl do: a JSON patch of one object."""
        with self._guard:
            stored = self._objects[_plural(kind), "llm", name]
            stored.replace(json_patch(stored.document, operations), manager)

    def delete(self, kind: str, name: str) -> None:
        """What `kubectl delete` does. Raises KeyError."""
        with self._guard:
            del self._objects[_plural(kind), "llm", name]

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Json | None) -> Json:
        """Raises Refused."""
        self.requests.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        found = _discovery(path)
        if found is not None:
            return found
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        if not rest:
            raise Refused(404, "NotFound", f"nothing at {path}")
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        plural, name = rest[0], rest[1] if len(rest) > 1 else ""
        with self._guard:
            return self._handle(method, (plural, namespace, name), query, body)

    def _handle(self, method: str, key: Path, query: Mapping[str, str], body: Json | None) -> Json:
        stored = self._objects.get(key)
        manager = query.get("fieldManager", "unknown")
        if method == "POST":
            assert body is not None
            return self._create((*key[:2], body["metadata"]["name"]), body, manager)
        if method == "PATCH" and query["_type"].startswith("application/apply-patch"):
            assert body is not None
            if stored is None:
                created = self._create(key, body, manager)
                self._objects[key].applied[manager] = {path for path, _ in _spec(body)}
                return created
            stored.apply(body, manager, force=query.get("force") == "true")
            return self._touched(stored)
        if method == "GET" and not key[2]:
            return self._list(key)
        if stored is None:
            raise Refused(404, "NotFound", f"{key[0]} {key[2]!r} not found")
        if method == "PATCH":
            assert body is not None
            # Helm sends a strategic patch for kinds that it knows. Our lists have no merge.
            stored.replace(merge_patch(stored.document, body), manager)
            return self._touched(stored)
        if method == "PUT":
            assert body is not None
            stored.replace(
                {**body, "metadata": {**stored.document["metadata"], **body["metadata"]}}, manager
            )
            return self._touched(stored)
        if method == "DELETE":
            del self._objects[key]
        return copy.deepcopy(stored.document)

    def _create(self, key: Path, body: Json, manager: str) -> Json:
        if key in self._objects:
            raise Refused(409, "AlreadyExists", f"{key[0]} {key[2]!r} already exists")
        document = copy.deepcopy(body)
        document["metadata"].setdefault("namespace", key[1])
        document["metadata"]["uid"] = str(uuid.uuid4())
        stored = self._objects[key] = _Stored(document, manager)
        return self._touched(stored)

    def _touched(self, stored: _Stored) -> Json:
        self._version += 1
        stored.document["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(stored.document)

    def _list(self, key: Path) -> Json:
        items = [
            copy.deepcopy(each.document)
            for place, each in self._objects.items()
            if place[0] == key[0] and key[1] in ("", place[1])
        ]
        return {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": items}


def _discovery(path: str) -> Json | None:
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = sorted({group.split("/")[0] for group in KINDS if "/" in group})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g) for g in groups]}
    group = path.removeprefix("/apis/").removeprefix("/api/")
    if group in KINDS:
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": group,
            "resources": [_resource(kind) for kind in KINDS[group]],
        }
    return None


def _group(name: str) -> Json:
    versions = [
        {"groupVersion": each, "version": each.split("/")[1]}
        for each in KINDS
        if each.startswith(f"{name}/")
    ]
    return {"name": name, "versions": versions, "preferredVersion": versions[0]}


def _resource(kind: str) -> Json:
    return {
        "name": _plural(kind),
        "singularName": kind.lower(),
        "namespaced": kind != "Namespace",
        "kind": kind,
        "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement
    cluster: FakeKubernetes

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet: what was asked is in ``cluster.requests``."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        query["_type"] = self.headers.get("Content-Type", "")
        length = int(self.headers.get("Content-Length") or 0)
        # An apply patch is YAML, everything else JSON, which is YAML too.
        body = yaml.safe_load(self.rfile.read(length)) if length else None
        if url.path == "/openapi/v2":  # an empty protobuf: nothing is known of any kind
            self._send(200, "application/octet-stream", b"")
            return
        try:
            code, answer = 200, self.cluster.answer(self.command, url.path, query, body)
        except Refused as refused:
            code, answer = refused.code, _status(refused)
        self._send(code, "application/json", json.dumps(answer).encode())

    def _send(self, code: int, kind: str, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve


def _status(refused: Refused) -> Json:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": refused.code,
        "reason": refused.reason,
        "message": str(refused),
    }


@contextmanager
def fake_kubernetes() -> Iterator[tuple[FakeKubernetes, str]]:
    """The cluster and its kubeconfig, while the server runs on a free port of loopback."""
    cluster = FakeKubernetes()
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="fake Kubernetes", daemon=True)
    thread.start()
    try:
        yield cluster, _kubeconfig(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _kubeconfig(url: str) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": url}}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [
                {
                    "name": "fake",
                    "context": {"cluster": "fake", "user": "nobody", "namespace": "llm"},
                }
            ],
            "current-context": "fake",
        }
    )
