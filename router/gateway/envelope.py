"""Around every request: its id, the API key, admission, accounting and the last resort."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.credentials import BearerCheck
from baton.errors import AuthenticationError, BatonError, InternalError
from baton.telemetry import GatewayMetrics
from router.gateway.context import RequestContext, put_context
from router.gateway.error_responses import error_response
from router.gateway.headers import REQUEST_ID, request_id, trace_context
from router.gateway.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

_Admission = AbstractContextManager[None]

GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


class Envelope:
    """ASGI middleware. Requests for tokens are counted and drained, all others not."""

    def __init__(
        self, app: ASGIApp, *, metrics: GatewayMetrics, lifecycle: Lifecycle, api_key: str | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._key = None if api_key is None else BearerCheck(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        now = asyncio.get_running_loop().time()
        context = RequestContext(request_id(headers), trace_context(headers), now)
        put_context(scope, context)
        answer = _Answer(send, context)
        if scope["method"] != "POST" or scope["path"] not in GENERATION_PATHS:
            await self._serve(scope, receive, answer, nullcontext())
            return
        self._metrics.requests_in_flight.inc()
        try:
            await self._serve(scope, receive, answer, self._lifecycle.request())
        finally:
            self._metrics.requests_in_flight.dec()
            self._metrics.requests.labels(outcome=context.outcome).inc()
            _log_end(context)

    async def _serve(
        self, scope: Scope, receive: Receive, answer: _Answer, admission: _Admission
    ) -> None:
        """Never raises but for cancellation; what happened is in the context's outcome."""
        context = answer.context
        try:
            self._authenticate(scope)
            with admission:
                await self._app(scope, receive, answer)
        except asyncio.CancelledError:
            context.outcome = "cancelled"
            raise
        except BatonError as error:
            context.outcome = error.code
            await error_response(error)(scope, receive, answer)
        except Exception:
            _log.exception("request %s crashed", context.request_id)
            failure = InternalError("the gateway failed; its log says why under this request's id")
            context.outcome = failure.code
            if not answer.started:
                await error_response(failure)(scope, receive, answer)

    def _authenticate(self, scope: Scope) -> None:
        if self._key is None or not scope["path"].startswith("/v1/"):
            return
        if not self._key.passes(scope["headers"]):
            raise AuthenticationError(
                "a valid API key is needed: send it as 'Authorization: Bearer KEY'"
            )


class _Answer:
    """``send`` that writes the request's id into the response's headers."""

    def __init__(self, send: Send, context: RequestContext) -> None:
        self.context = context
        self.started = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            MutableHeaders(scope=message)[REQUEST_ID] = self.context.request_id
        await self._send(message)


def _log_end(context: RequestContext) -> None:
    _log.info(
        "request %s ended: %s after %.3f s, %d prompt and %d completion tokens",
        context.request_id,
        context.outcome,
        asyncio.get_running_loop().time() - context.arrived_at,
        context.num_prompt_tokens,
        context.num_completion_tokens,
    )
