"""Every refusal in the OpenAI API's shape."""

from __future__ import annotations

import math
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from baton.errors import AuthenticationError, BatonError
from router.gateway.context import context_of


def error_response(error: BatonError) -> JSONResponse:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.http_status, headers)


async def on_baton_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler of the application for the one tree of errors."""
    assert isinstance(error, BatonError)
    context_of(request.scope).outcome = error.code
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for what HTTP itself refuses: no such route, method or media type."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    code = status.phrase.lower().replace(" ", "_")
    context_of(request.scope).outcome = code
    message = f"{request.method} {request.url.path[:256]}: {error.detail}"
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    headers = dict(error.headers or {})
    return JSONResponse({"error": body}, status, headers)
