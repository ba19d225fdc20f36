"""The launcher's and the commands' view of a running gateway, over its HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from baton.credentials import API_KEY, bearer, credential
from baton.errors import UnavailableError

DEFAULT_URL = "http://127.0.0.1:8000"


def authorization() -> dict[bytes, bytes]:
    """The header for a server that wants a key; it is taken from ``BATON_API_KEY``. Raises
    ConfigurationError for what can be no key."""
    key = credential(API_KEY)
    return {} if key is None else {b"Authorization": bearer(key)}


def server_url(address: str) -> str:
    """What a person may give for a server's address: also the one for API clients."""
    return address.rstrip("/").removesuffix("/v1")


def url_of(host: str, port: int) -> str:
    """The address to use on this machine for a gateway that listens on ``host:port``."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker of ``GET /status``."""

    worker_id: str
    role: str
    ready: bool
    address: str
    model: str
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_referenced_blocks: int
    num_quarantined_blocks: int
    num_blocks: int
    block_size: int
    num_ranks: int

    @property
    def used_share(self) -> float:
        """Of the KV blocks, those that requests hold; cached ones can be reused at once."""
        held = self.num_referenced_blocks + self.num_quarantined_blocks
        return held / self.num_blocks if self.num_blocks else 0.0


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """``GET /status``, and the same as it came."""

    workers: tuple[WorkerRow, ...]
    missing: tuple[str, ...]
    degraded: tuple[str, ...]
    raw: Mapping[str, Any]

    def ready_workers(self, role: str) -> list[WorkerRow]:
        return [worker for worker in self.workers if worker.role == role and worker.ready]


def parse_status(data: Mapping[str, Any]) -> ServerStatus:
    """Raises UnavailableError for anything but Baton's own answer."""
    fields = WorkerRow.__dataclass_fields__
    try:
        rows = [WorkerRow(**{name: w[name] for name in fields}) for w in data["workers"]]
        missing, degraded = (
            tuple(str(sentence) for sentence in data[what]) for what in ("missing", "degraded")
        )
    except (KeyError, TypeError):
        raise UnavailableError("the server there is no Baton gateway of this version") from None
    rows.sort(key=lambda row: (row.role != "prefill", len(row.worker_id), row.worker_id))
    return ServerStatus(tuple(rows), missing, degraded, data)


def refused(url: str, error: httpx.HTTPError) -> UnavailableError:
    """The sentence for a server that does not answer."""
    if isinstance(error, httpx.ConnectError):
        return UnavailableError(f"no server answers at {url}; start one with `baton serve`")
    reason = str(error) or type(error).__name__
    return UnavailableError(f"the server at {url} did not answer: {reason}")


def get(
    url: str, *, timeout_s: float, headers: Mapping[bytes, bytes] | None = None
) -> httpx.Response:
    """GET past all proxies. Raises httpx.HTTPError and httpx.InvalidURL."""
    # To load the certificates that only https needs takes 20 ms of CPU, in every call.
    verify = not url.startswith("http://")
    return httpx.get(url, timeout=timeout_s, trust_env=False, headers=headers, verify=verify)


def fetch_json(url: str, path: str, *, timeout_s: float = 5.0) -> Any:
    """GET of a JSON page. Raises UnavailableError, in a sentence."""
    try:
        answer = get(url + path, timeout_s=timeout_s, headers=authorization())
        answer.raise_for_status()
        return answer.json()
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        raise UnavailableError(f"{url}{path} answered {status}") from None
    except httpx.InvalidURL as error:
        raise UnavailableError(f"{url} is no address of a server: {error}") from None
    except httpx.HTTPError as error:
        raise refused(url, error) from None
    except ValueError:
        raise UnavailableError(f"{url}{path} is no JSON: another program answers there") from None
