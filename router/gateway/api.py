"""The OpenAI API's routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from baton.errors import DeadlineExceededError, ModelNotFoundError
from router.gateway.body import parse_object, read_body
from router.gateway.chat import ChatJob
from router.gateway.completions import CompletionJob
from router.gateway.context import context_of
from router.gateway.headers import deadline_s, wants_timeline
from router.gateway.openapi import request_body
from router.gateway.respond import GenerationResponse
from router.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    parse_chat,
    parse_completion,
)
from router.gateway.services import Services

_INLINE_BYTES = 64 * 1024
"""Of a body that is parsed on the event loop (some 2 ms at worst); larger ones in a thread."""

R = TypeVar("R", bound=GenerationRequest)


def api_routes(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI API"])

    @routes.post("/chat/completions", openapi_extra=request_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        timeline = wants_timeline(request.headers)
        deadline, parsed = await _receive(request, services, parse_chat)
        return GenerationResponse(
            services, ChatJob(parsed), deadline=deadline, with_timeline=timeline
        )

    @routes.post("/completions", openapi_extra=request_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continues text or token ids."""
        timeline = wants_timeline(request.headers)
        deadline, parsed = await _receive(request, services, parse_completion)
        return GenerationResponse(
            services, CompletionJob(parsed), deadline=deadline, with_timeline=timeline
        )

    @routes.get("/models")
    async def models() -> JSONResponse:
        """The one model served here."""
        return JSONResponse({"object": "list", "data": [_model(services)]})

    @routes.get("/models/{model_id:path}")
    async def model(model_id: str) -> JSONResponse:
        _check_model(model_id, services)
        return JSONResponse(_model(services))

    return routes


async def _receive(
    request: Request, services: Services, parse: Callable[[dict[str, Any]], R]
) -> tuple[float, R]:
    """The request's deadline on the event loop's clock, and its body, parsed and checked."""
    gateway = services.config.gateway
    deadline = context_of(request.scope).arrived_at + deadline_s(request.headers, gateway)
    try:
        async with asyncio.timeout_at(deadline):
            body = await read_body(request.headers, request.receive, limit=gateway.max_body_bytes)
    except TimeoutError:
        raise DeadlineExceededError("the request's deadline ran out before its body came") from None

    def work() -> R:
        return parse(parse_object(body))

    parsed = work() if len(body) <= _INLINE_BYTES else await asyncio.to_thread(work)
    _check_model(parsed.model, services)
    return deadline, parsed


def _check_model(asked: str, services: Services) -> None:
    if asked != services.model_id:
        shown = asked if len(asked) <= 128 else f"{asked[:128]}..."
        raise ModelNotFoundError(
            f"no model {shown!r} here; this cluster serves {services.model_id!r}", param="model"
        )


def _model(services: Services) -> dict[str, Any]:
    status = services.orchestrator.status()
    return {
        "id": services.model_id,
        "object": "model",
        "created": services.started_at,
        "owned_by": "baton",
        "max_model_len": services.planner.context_length(status),
    }
