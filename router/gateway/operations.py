"""Routes for operators: is it alive, is it ready, what does it know, what does it count."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from baton.errors import DrainingError, UnavailableError
from router.gateway.metrics_page import merged_page
from router.gateway.services import Services


def operations_routes(services: Services) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> JSONResponse:
        """The process is alive; says nothing about workers."""
        return JSONResponse({"status": "alive"})

    @routes.head("/ready", include_in_schema=False)
    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """200 when a request would be served, with what makes it serve worse than it could;
        else 503 with what is missing."""
        if services.lifecycle.draining:
            raise DrainingError("this gateway is draining")
        cluster = services.orchestrator.status()
        if cluster.missing:
            raise UnavailableError("not ready: " + " ".join(cluster.missing))
        return JSONResponse({"status": "ready", "degraded": cluster.degraded})

    @routes.get("/status")
    async def status() -> JSONResponse:
        """The cluster as this gateway last saw it."""
        cluster = services.orchestrator.status()
        own = {"model": services.model_id, "draining": services.lifecycle.draining}
        return JSONResponse({**own, "ready": cluster.ready, **asdict(cluster)})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus: this gateway's series and each live worker's as last reported."""
        pages = services.orchestrator.worker_metrics()
        page = await asyncio.to_thread(merged_page, services.registry, pages)
        return Response(page, media_type=None, headers={"content-type": CONTENT_TYPE_LATEST})

    return routes
