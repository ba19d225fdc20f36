"""What the gateway knows of a request beside its body, and how the request ended."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from router.gateway.headers import TraceContext

_KEY = "baton.request"


@dataclass(slots=True, eq=False)
class RequestContext:
    """Made by the envelope around every request; the counts are for its log line."""

    request_id: str
    trace: TraceContext
    arrived_at: float
    """On the event loop's clock, seconds."""
    outcome: str = "ok"
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0


def put_context(scope: Scope, context: RequestContext) -> None:
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    context = scope[_KEY]
    assert isinstance(context, RequestContext)
    return context
