"""How a server is asked over HTTP."""

from __future__ import annotations

import ssl
from typing import Any

import httpx
import pytest

from baton.errors import ConfigurationError, UnavailableError
from cluster.redis_server import free_port
from cluster.server_client import authorization, fetch_json


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


def test_key_is_shown_without_the_lines_end_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    assert authorization() == {}
    monkeypatch.setenv("BATON_API_KEY", "k3y\n")
    request = httpx.Request("GET", "http://nowhere", headers=authorization())
    assert (b"Authorization", b"Bearer k3y") in request.headers.raw
    monkeypatch.setenv("BATON_API_KEY", "two words")
    with pytest.raises(ConfigurationError, match="BATON_API_KEY has whitespace inside"):
        authorization()
