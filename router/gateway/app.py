"""The gateway's application: puts its parts together. Knows no server and no worker."""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import Checkpoint
from baton.config import BatonConfig
from baton.errors import BatonError
from baton.telemetry import GatewayMetrics
from router.gateway.api import api_routes
from router.gateway.envelope import Envelope
from router.gateway.error_responses import on_baton_error, on_http_error
from router.gateway.lifecycle import Lifecycle
from router.gateway.openapi import describe_bodies
from router.gateway.operations import operations_routes
from router.gateway.plan import Planner
from router.gateway.services import Services
from router.interfaces import Orchestrator
from router.tokenization.tokenizer import PromptTokenizer


def create_app(
    config: BatonConfig,
    orchestrator: Orchestrator,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    metrics: GatewayMetrics,
    registry: CollectorRegistry,
    *,
    lifecycle: Lifecycle | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The ASGI application. It owns nothing: its caller closes the orchestrator.

    ``registry`` is the one that ``metrics`` are declared on; ``/metrics`` shows all
    of it. With ``api_key`` every path under ``/v1/`` asks for it. The caller drains
    through ``lifecycle``, which is ``app.state.lifecycle`` too.

    Raises CheckpointError for a chat template that does not compile.
    """
    prompt_tokenizer = PromptTokenizer(tokenizer, checkpoint)
    lifecycle = lifecycle or Lifecycle()
    services = Services(
        config=config,
        orchestrator=orchestrator,
        tokenizer=prompt_tokenizer,
        planner=Planner(config, checkpoint, prompt_tokenizer),
        metrics=metrics,
        registry=registry,
        lifecycle=lifecycle,
        model_id=config.served_model_name or checkpoint.name,
        fingerprint=f"fp_{checkpoint.revision[:16]}",
        started_at=int(time.time()),
    )
    # The documentation pages of FastAPI load scripts from elsewhere; a cluster may be offline.
    app = FastAPI(title="Baton", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.lifecycle = lifecycle
    app.include_router(api_routes(services))
    app.include_router(operations_routes(services))
    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_middleware(Envelope, metrics=metrics, lifecycle=lifecycle, api_key=api_key)
    describe_bodies(app)
    return app
