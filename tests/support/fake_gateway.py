"""A gateway whose orchestrator answers from a script, in this process or on a port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import DEFAULT_MODEL, BatonConfig, parse_config
from baton.telemetry import GatewayMetrics
from router.gateway.app import create_app
from router.gateway.lifecycle import Lifecycle
from router.request import Arrival, ChoiceOutput, ChoiceRequest
from router.status import ClusterStatus, WorkerStatus

Step = ChoiceOutput | BaseException | asyncio.Event
MODEL = "test-model"
EOS = 2


@functools.cache
def real_checkpoint() -> Checkpoint:
    return open_checkpoint(DEFAULT_MODEL)


@functools.cache
def real_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(real_checkpoint().folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_of(text: str) -> list[int]:
    return real_tokenizer().encode(text, add_special_tokens=False).ids


def text_of(ids: Iterable[int]) -> str:
    return real_tokenizer().decode(list(ids), skip_special_tokens=True)


def answer(text: str, *, cached: int = 0, size: int = 1, end: str = "stop") -> list[Step]:
    """Outputs of ``size`` tokens each that spell the text; with ``stop`` an EOS ends them."""
    ids = ids_of(text) + ([EOS] if end == "stop" else [])
    parts = [tuple(ids[at : at + size]) for at in range(0, len(ids), size)]
    steps: list[Step] = [ChoiceOutput(part) for part in parts[:-1]]
    return [*steps, ChoiceOutput(parts[-1], end, cached)]


def worker_status(worker_id: str = "decode-0", **changes: Any) -> WorkerStatus:
    values = {
        "worker_id": worker_id, "role": "decode", "epoch": "ab" * 16, "address": "127.0.0.1:1",
        "ready": True, "model": MODEL, "num_running": 0, "num_waiting": 0, "num_free_blocks": 10,
        "num_cached_blocks": 0, "num_referenced_blocks": 0, "num_quarantined_blocks": 0,
        "num_blocks": 10, "block_size": 16, "max_model_len": 8192, "generation": "0",
        "last_report_age_s": 0.1,
    }  # fmt: skip
    return WorkerStatus(**(values | changes))


def _arrived(step: ChoiceOutput) -> ChoiceOutput:
    """Its tokens have come in one message, unless the script says how."""
    if step.arrivals or not step.token_ids:
        return step
    return replace(step, arrivals=(Arrival(time.perf_counter(), len(step.token_ids)),))


@dataclass(eq=False)
class ScriptedOrchestrator:
    """Plays ``script(choice)``; an Event among the steps is waited for."""

    script: Callable[[ChoiceRequest], list[Step]] = lambda choice: answer("Hello, world!")
    cluster: ClusterStatus = field(
        default_factory=lambda: ClusterStatus((worker_status(),), registry_up=True)
    )
    pages: list[bytes] = field(default_factory=list)
    choices: list[ChoiceRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    num_running: int = 0
    paced: bool = True
    """Let others run between two outputs."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, choice: ChoiceRequest) -> AsyncIterator[ChoiceOutput]:
        self.choices.append(choice)
        self.num_running += 1
        self.changed.set()
        ended = False
        try:
            for step in self.script(choice):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, BaseException):
                    ended = True
                    raise step
                else:
                    ended = step.finish_reason is not None
                    yield _arrived(step)
                if self.paced:
                    await asyncio.sleep(0)
            ended = True
        finally:
            self.num_running -= 1
            if not ended:
                self.cancelled.append(choice.choice_index)
            self.changed.set()

    def status(self) -> ClusterStatus:
        return self.cluster

    def worker_metrics(self) -> list[bytes]:
        return self.pages

    async def wait(self, condition: Callable[[ScriptedOrchestrator], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition(self):
                self.changed.clear()
                await self.changed.wait()


class _Server(uvicorn.Server):
    capture_signals = contextlib.nullcontext  # the signals are pytest's


class Gateway:
    """The application under test with all it was made of; ``orchestrator`` in place of a
    scripted one."""

    def __init__(
        self,
        script: Callable[[ChoiceRequest], list[Step]] | None = None,
        *,
        api_key: str | None = None,
        checkpoint: Checkpoint | None = None,
        orchestrator: Any = None,
        sections: Mapping[str, Any] | None = None,
        **gateway: Any,
    ) -> None:
        """``gateway``: settings of that section; ``sections``: other ones."""
        settings = {"served_model_name": MODEL, "gateway": gateway, **(sections or {})}
        self.config: BatonConfig = parse_config(settings)
        self.orchestrator = orchestrator or ScriptedOrchestrator()
        if script is not None:
            self.orchestrator.script = script
        self.registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.app: FastAPI = create_app(
            self.config,
            self.orchestrator,
            real_tokenizer(),
            checkpoint or real_checkpoint(),
            GatewayMetrics(self.registry),
            self.registry,
            lifecycle=self.lifecycle,
            api_key=api_key,
        )

    def client(self, on_bytes: Callable[[bytes], None] | None = None) -> httpx.AsyncClient:
        """``on_bytes`` sees each piece of a body as it is sent."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def spy(message: Any) -> None:
                if on_bytes is not None:
                    on_bytes(message.get("body", b""))
                await send(message)

            await self.app(scope, receive, spy)

        transport = httpx.ASGITransport(app)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        async with self.client() as client:
            if body is not None:
                options["json"] = body
            return await client.post(path, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path, **options)

    async def chat(self, content: Any = "Hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", chat_body(content, **fields))

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": prompt} | fields)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """A real server on a free port; gives its base URL."""
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(self.app, log_config=None, lifespan="off", http="httptools")
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await task
            listener.close()


def chat_body(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields


def events(text: str) -> list[Any]:
    """The data of a stream's events, JSON read; comments as they are."""
    found: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: {"):
            found.append(json.loads(block.removeprefix("data: ")))
        elif block:
            found.append(block)
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, its shape checked."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]
