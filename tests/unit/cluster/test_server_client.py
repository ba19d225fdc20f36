"""How a server is asked over HTTP."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from baton.errors import UnavailableError
from cluster.redis_server import free_port
from cluster.server_client import fetch_json


@pytest.mark.parametrize(("scheme", "num_loads"), [("http", 0), ("https", 1)])
def test_certificates_are_loaded_for_https_alone(
    monkeypatch: pytest.MonkeyPatch, scheme: str, num_loads: int
) -> None:
    contexts: list[ssl.SSLContext] = []
    create = ssl.create_default_context

    def counted(*args: Any, **options: Any) -> ssl.SSLContext:
        contexts.append(create(*args, **options))
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", counted)
    with pytest.raises(UnavailableError, match="no server answers"):
        fetch_json(f"{scheme}://127.0.0.1:{free_port()}", "/status")
    assert [context.verify_mode for context in contexts] == [ssl.CERT_REQUIRED] * num_loads
