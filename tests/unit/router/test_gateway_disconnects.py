"""Clients that leave: their choices end at once and nothing of the request is left."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.fake_gateway import Gateway, answer, chat_body

from router.request import ChoiceOutput


async def tasks_besides(known: set[asyncio.Task]) -> set[asyncio.Task]:
    """Tasks that were not there before, once those that are ending have had their turns."""
    for _ in range(20):
        await asyncio.sleep(0)
    return {task for task in asyncio.all_tasks() if not task.done()} - known


async def post_raw(url: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def body_of(**fields) -> bytes:
    return json.dumps(chat_body(**fields)).encode()


SCRIPTS = {
    "before the first output": lambda choice: [asyncio.Event()],
    "between outputs": lambda choice: [*answer("Hi")[:1], asyncio.Event()],
    "while outputs come": lambda choice: [ChoiceOutput((5,))] * 1_000_000,
}


@pytest.mark.parametrize("moment", SCRIPTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_cancels_all_choices_and_leaves_nothing(
    stream: bool, moment: str
) -> None:
    gateway = Gateway(SCRIPTS[moment], sse_keepalive_s=0.05)
    async with gateway.served() as url:
        _, warm = await post_raw(url, b"{}")
        warm.close()
        await until(lambda: gateway.metric("baton_requests_total", outcome="invalid_request"))
        before = {task for task in asyncio.all_tasks() if not task.done()}
        _, writer = await post_raw(url, body_of(stream=stream, n=3))
        await gateway.orchestrator.wait(lambda o: o.num_running == 3)
        writer.transport.abort()
        await gateway.orchestrator.wait(lambda o: sorted(o.cancelled) == [0, 1, 2])
        await until(lambda: gateway.metric("baton_requests_in_flight") == 0)
        assert gateway.orchestrator.num_running == 0
        assert gateway.metric("baton_requests_total", outcome="cancelled") == 1
        assert await tasks_besides(before) == set()


async def test_client_that_leaves_while_sending_its_body_is_counted_as_cancelled() -> None:
    gateway = Gateway()
    async with gateway.served() as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        await until(lambda: gateway.metric("baton_requests_in_flight") == 1)
        writer.transport.abort()
        await until(lambda: gateway.metric("baton_requests_in_flight") == 0)
    assert gateway.metric("baton_requests_total", outcome="cancelled") == 1
    assert gateway.orchestrator.choices == []


async def test_client_that_stays_for_its_answer_is_not_cancelled() -> None:
    gateway = Gateway()
    async with gateway.served() as url:
        reader, writer = await post_raw(url, body_of(stream=True))
        async with asyncio.timeout(10):
            await reader.readuntil(b"[DONE]")
        writer.close()
        await until(lambda: gateway.metric("baton_requests_in_flight") == 0)
    assert gateway.metric("baton_requests_total", outcome="ok") == 1
    assert gateway.orchestrator.cancelled == []


async def test_one_connection_serves_request_after_request() -> None:
    gateway = Gateway()
    async with gateway.served() as url:
        reader, writer = await post_raw(url, body_of())
        for count in range(1, 4):
            async with asyncio.timeout(10):
                await reader.readuntil(b'"cached_tokens":0}}}')
            await until(lambda: gateway.metric("baton_requests_total", outcome="ok") == count)  # noqa: B023
            body = body_of()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
        writer.close()


async def test_first_token_is_sent_when_it_comes_and_not_later() -> None:
    gate = asyncio.Event()
    gateway = Gateway(lambda choice: [*answer("Hi")[:1], gate, *answer(" you")])
    async with gateway.served() as url:
        reader, writer = await post_raw(url, body_of(stream=True))
        async with asyncio.timeout(10):
            await reader.readuntil(b'"content":"Hi"')
            gate.set()
            await reader.readuntil(b"[DONE]")
        writer.close()
