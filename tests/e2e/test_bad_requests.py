"""What cannot be served is refused by name, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from e2e.conftest import Serving
from support.server import BatonServer

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(serving: Serving) -> BatonServer:
    return serving()


CASES: dict[str, tuple[str, str | None]] = {
    "long prompt": (json.dumps({"prompt": [5] * 9000}), "prompt"),
    "malformed JSON": ('{"model": ', None),
    "lone surrogate": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "messages.0.content",
    ),
    "NaN": (json.dumps({**CHAT, "temperature": float("nan")}), "temperature"),
    "wrong type": (json.dumps({**CHAT, "temperature": "hot"}), "temperature"),
    "unknown field": (json.dumps({**CHAT, "temprature": 1}), "temprature"),
    "negative temperature": (json.dumps({**CHAT, "temperature": -1}), "temperature"),
    "absurd max_tokens": (json.dumps({**CHAT, "max_tokens": 10**12}), "max_tokens"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bad_request_is_named_and_the_server_goes_on(server: BatonServer, case: str) -> None:
    body, param = CASES[case]
    path = "/v1/completions" if '"prompt"' in body else "/v1/chat/completions"
    model = server.model()
    if body.startswith("{") and '"model"' not in body:
        body = f'{{"model": {json.dumps(model)}, {body[1:]}'
    with server.client() as client:
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= response.status_code < 500, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        good = client.post("/v1/chat/completions", json={"model": model, **CHAT})
        assert good.status_code == 200, good.text
    server.wait_at_rest()


@pytest.mark.slow
def test_unknown_model_is_not_found(server: BatonServer) -> None:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json={"model": "gpt-9", **CHAT})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "gpt-9" in response.json()["error"]["message"]
