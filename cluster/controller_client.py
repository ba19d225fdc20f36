"""The commands' view of a pool controller, over its HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton.credentials import CONTROLLER_TOKEN, bearer, credential
from baton.errors import AuthenticationError, ConfigurationError, UnavailableError, from_code
from cluster.server_client import server_url
from cluster.state import RunFolder, state_root

_WHERE = (
    "Without --url, `baton scale` finds the controller of the `baton serve` that runs here; one in "
    "a process of its own prints its address when it starts (`controller listening on ...`)"
)
"""Where the address is found that ``--url`` wants."""


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One pool of ``GET /v1/pools``."""

    role: str
    desired: int
    running: int
    ready: int
    leaving: int
    max_replicas: int

    @property
    def settled(self) -> bool:
        """It is as large as it should be, and nobody comes or goes."""
        return self.running == self.ready == self.desired and self.leaving == 0

    def __str__(self) -> str:
        text = f"{self.ready} of {self.desired} ready"
        return f"{text}, {self.leaving} leaving" if self.leaving else text


@dataclass(frozen=True, slots=True)
class ControllerAddress:
    """Where a controller answers, and what it wants to be shown."""

    url: str
    token: str = field(repr=False)

    def pools(self, *, timeout_s: float = 5.0) -> dict[str, PoolRow]:
        """All pools as they are. Raises BatonError, in a sentence."""
        return self._ask("GET", None, timeout_s)

    def wish(self, sizes: Mapping[str, int], *, timeout_s: float = 10.0) -> dict[str, PoolRow]:
        """Asks for other sizes. Raises BatonError; what the controller refuses is said in
        its own words."""
        return self._ask("PUT", dict(sizes), timeout_s)

    def _ask(self, method: str, body: Any, timeout_s: float) -> dict[str, PoolRow]:
        try:
            answer = httpx.request(
                method,
                f"{self.url}/v1/pools",
                json=body,
                timeout=timeout_s,
                trust_env=False,
                headers={b"Authorization": bearer(self.token)},
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UnavailableError(f"{self.url} is no address of a controller: {error}") from None
        except httpx.ConnectError:
            raise UnavailableError(f"no controller answers at {self.url}") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(
                f"the controller at {self.url} did not answer: {reason}"
            ) from None
        return self._parsed(answer)

    def _parsed(self, answer: httpx.Response) -> dict[str, PoolRow]:
        """Raises the error that the controller answered with."""
        names = PoolRow.__dataclass_fields__
        try:
            data = answer.json()
            if answer.status_code == 200:
                pools = data["pools"].items()
                return {name: PoolRow(**{n: pool[n] for n in names}) for name, pool in pools}
            error = data["error"]
            code, message = str(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UnavailableError(
                f"what answers at {self.url} is no Baton controller of this version"
            ) from None
        if answer.status_code == 401:
            raise AuthenticationError(
                f"{self.url} refuses the token; put that of the controller there into "
                f"{CONTROLLER_TOKEN}. {_WHERE}"
            )
        if code in ("not_found", "method_not_allowed"):
            raise UnavailableError(
                f"what answers at {self.url} is no controller, but perhaps a gateway. {_WHERE}"
            )
        raise from_code(code, message)


def known_controller(cluster: str, url: str | None) -> ControllerAddress:
    """The controller at ``url``, by default that of the server which runs here.

    The token is that of the environment, or of the server that runs here. Raises
    UnavailableError where nothing runs, ConfigurationError where there is no token, or
    one that none can be.
    """
    state = RunFolder(cluster).running()
    if url is None:
        if state is None:
            raise UnavailableError(
                f"no server of cluster {cluster!r} runs here (looked in {state_root() / cluster}); "
                "give the address of its controller with --url"
            )
        return ControllerAddress(state.controller_url, state.controller_token)
    url = server_url(url)
    token = credential(CONTROLLER_TOKEN)
    if token is None and state is not None and state.controller_url == url:
        token = state.controller_token
    if token is None:
        raise ConfigurationError(
            f"{CONTROLLER_TOKEN} is not set; it is the token of the controller at {url}"
        )
    return ControllerAddress(url, token)
