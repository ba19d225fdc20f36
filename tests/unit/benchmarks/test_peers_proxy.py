"""The proxy that makes one server of vLLM's two: what each of them is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.peers.proxy import Proxy

PARAMS = {"remote_engine_id": "e", "remote_block_ids": [1, 2], "remote_port": 5}
ASKED = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 16,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
}
CHUNKS = [b"data: {}\n\n", b"data: [DONE]\n\n"]


class Instances:
    """Both of them; ``asked`` says who was asked for what."""

    def __init__(self, prefill_status: int = 200) -> None:
        self.asked: list[tuple[str, str, dict]] = []
        self._prefill_status = prefill_status

    def proxy(self) -> httpx.AsyncClient:
        prefill, decode = (
            httpx.AsyncClient(base_url=f"http://{name}", transport=httpx.MockTransport(answer))
            for name, answer in (("prefill", self._prefill), ("decode", self._decode))
        )
        transport = httpx.ASGITransport(Proxy(prefill, decode))
        return httpx.AsyncClient(base_url="http://proxy", transport=transport)

    def _note(self, name: str, request: httpx.Request) -> None:
        content = request.read()
        self.asked.append((name, request.url.path, json.loads(content) if content else {}))

    def _prefill(self, request: httpx.Request) -> httpx.Response:
        self._note("prefill", request)
        return httpx.Response(self._prefill_status, json={"kv_transfer_params": PARAMS})

    def _decode(self, request: httpx.Request) -> httpx.Response:
        self._note("decode", request)
        headers = {"Content-Type": "text/event-stream"}
        return httpx.Response(200, headers=headers, content=chunks())


async def chunks() -> AsyncIterator[bytes]:
    for chunk in CHUNKS:
        yield chunk


async def test_decode_is_told_what_prefill_says_of_the_blocks() -> None:
    instances = Instances()
    async with instances.proxy() as client:
        answer = await client.post("/v1/chat/completions", json=ASKED)
    (first, _, to_prefill), (second, _, to_decode) = instances.asked
    assert (first, second) == ("prefill", "decode")
    assert to_prefill["max_tokens"] == 1
    assert to_prefill["stream"] is False
    assert "stream_options" not in to_prefill
    assert to_prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert to_prefill["messages"] == ASKED["messages"]
    assert to_decode == {**ASKED, "kv_transfer_params": PARAMS}
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.content == b"".join(CHUNKS)


async def test_a_refusal_by_prefill_is_passed_on_and_decode_is_not_asked() -> None:
    instances = Instances(prefill_status=400)
    async with instances.proxy() as client:
        answer = await client.post("/v1/chat/completions", json=ASKED)
    assert answer.status_code == 400
    assert [name for name, _, _ in instances.asked] == ["prefill"]


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_what_is_no_chat_goes_to_decode_alone(path: str) -> None:
    instances = Instances()
    async with instances.proxy() as client:
        await client.get(path)
    assert instances.asked == [("decode", path, {})]
