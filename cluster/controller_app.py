"""The controller's HTTP API: how large the pools are, and wishes for other sizes."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from baton.credentials import BearerCheck
from baton.errors import (
    AuthenticationError,
    BatonError,
    InternalError,
    UnavailableError,
)
from cluster.controller import PoolController
from router.gateway.body import parse_object, read_body, refuse_repeated_names
from router.gateway.error_responses import error_response

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 64 * 1024


@dataclass(slots=True, eq=False)
class Seat:
    """Of the controller: who answers for the pools, and why nobody does yet."""

    controller: PoolController | None = None
    reason: str = "this controller is starting"

    def taken(self) -> PoolController:
        """Raises UnavailableError while nobody controls from here."""
        if self.controller is None:
            raise UnavailableError(self.reason)
        return self.controller


def create_controller_app(seat: Seat, *, token: str, samples: CollectorRegistry) -> FastAPI:
    """The ASGI application; ``samples`` is what ``/metrics`` shows. Everything under
    ``/v1/`` asks for ``token``."""
    app = FastAPI(title="Baton's pool controller", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_crash)
    check = BearerCheck(token)

    def authenticate(request: Request) -> None:
        if not check.passes(request.headers.raw):
            raise AuthenticationError(
                "the controller's token is needed: send it as 'Authorization: Bearer TOKEN'"
            )

    @app.get("/health")
    async def health() -> JSONResponse:
        """The process is alive."""
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 while this one controls the pools, else 503 with the reason."""
        seat.taken()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        if seat.controller is not None:
            seat.controller.publish()
        page = generate_latest(samples)
        return Response(page, media_type=None, headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/pools")
    async def pools(request: Request) -> JSONResponse:
        authenticate(request)
        return _answer(seat.taken())

    @app.put("/v1/pools")
    async def scale(request: Request) -> JSONResponse:
        authenticate(request)
        controller = seat.taken()
        body = await read_body(request.headers, request.receive, limit=_MAX_BODY_BYTES)
        wish = parse_object(body)
        refuse_repeated_names(body)
        await controller.wish(wish)
        return _answer(controller)

    return app


def _answer(controller: PoolController) -> JSONResponse:
    pools = {name: asdict(status) for name, status in controller.pools().items()}
    return JSONResponse({"pools": pools, "registry_up": controller.registry_up})


async def _on_baton_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """What HTTP itself refuses: no such path, method or media type."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    body = {
        "message": f"{request.method} {request.url.path[:256]}: {error.detail}",
        "type": "invalid_request_error",
        "param": None,
        "code": status.phrase.lower().replace(" ", "_"),
    }
    return JSONResponse({"error": body}, status, dict(error.headers or {}))


async def _on_crash(_: Request, error: Exception) -> JSONResponse:
    logger.error("the controller's API failed", exc_info=error)
    return error_response(InternalError("the controller failed; its log says why"))
