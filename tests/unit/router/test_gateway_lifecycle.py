"""Draining: new requests are refused, running ones go on until they are refused too."""

from __future__ import annotations

import asyncio

import pytest
from support.fake_gateway import Gateway, answer, error_of, events


@pytest.fixture
def gate() -> asyncio.Event:
    return asyncio.Event()


async def test_draining_refuses_new_requests_and_readiness_but_not_health() -> None:
    gateway = Gateway()
    gateway.lifecycle.begin_drain()
    for response in (await gateway.chat(), await gateway.complete(stream=True)):
        assert response.status_code == 503
        assert error_of(response)["code"] == "draining"
        assert int(response.headers["retry-after"]) > 0
    assert (await gateway.get("/ready")).status_code == 503
    assert (await gateway.get("/health")).status_code == 200
    assert (await gateway.get("/metrics")).status_code == 200
    assert gateway.orchestrator.choices == []
    assert gateway.metric("baton_requests_in_flight") == 0
    assert gateway.metric("baton_requests_total", outcome="draining") == 2


async def test_running_request_goes_on_while_draining_and_then_all_is_idle(gate) -> None:
    gateway = Gateway(lambda choice: [gate, *answer("Hi")])
    request = asyncio.create_task(gateway.chat())
    await gateway.orchestrator.wait(lambda o: o.num_running == 1)
    gateway.lifecycle.begin_drain()
    idle = asyncio.create_task(gateway.lifecycle.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    gate.set()
    assert (await request).status_code == 200
    await idle


@pytest.mark.parametrize("stream", [False, True])
async def test_request_without_output_that_is_refused_gets_503(stream: bool, gate) -> None:
    gateway = Gateway(lambda choice: [gate])
    request = asyncio.create_task(gateway.chat(stream=stream))
    await gateway.orchestrator.wait(lambda o: o.num_running == 1)
    gateway.lifecycle.refuse_running()
    response = await request
    assert response.status_code == 503
    assert error_of(response)["code"] == "draining"
    assert gateway.orchestrator.cancelled == [0]
    await gateway.lifecycle.wait_idle()


async def test_stream_that_is_refused_ends_with_an_error_event(gate) -> None:
    gateway = Gateway(lambda choice: [*answer("Hi")[:1], gate])
    shown = asyncio.Event()
    async with gateway.client(lambda data: shown.set() if b"Hi" in data else None) as client:
        body = {"model": "test-model", "prompt": "x", "stream": True}
        request = asyncio.create_task(client.post("/v1/completions", json=body))
        await shown.wait()
        gateway.lifecycle.refuse_running()
        found = events((await request).text)
    assert found[-1]["error"]["code"] == "draining"
    assert gateway.orchestrator.cancelled == [0]


async def test_request_that_was_still_sending_its_body_is_refused_as_well(gate) -> None:
    gateway = Gateway()

    async def body():
        yield b'{"model": "test-model", '
        gateway.lifecycle.refuse_running()
        yield b'"prompt": "x"}'

    response = await gateway.post(
        "/v1/completions", content=body(), headers={"content-type": "application/json"}
    )
    assert error_of(response)["code"] == "draining"
    assert gateway.orchestrator.choices == []


async def test_refusing_twice_changes_nothing(gate) -> None:
    gateway = Gateway(lambda choice: [gate])
    request = asyncio.create_task(gateway.chat())
    await gateway.orchestrator.wait(lambda o: o.num_running == 1)
    gateway.lifecycle.refuse_running()
    gateway.lifecycle.refuse_running()
    assert (await request).status_code == 503
    gateway.lifecycle.refuse_running()


async def test_idle_from_the_start() -> None:
    await asyncio.wait_for(Gateway().lifecycle.wait_idle(), 1)
