"""The objects that the routes share; the application's factory puts them together."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from baton.config import BatonConfig
from baton.telemetry import GatewayMetrics
from router.gateway.lifecycle import Lifecycle
from router.gateway.plan import Planner
from router.interfaces import Orchestrator
from router.tokenization.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class Services:
    config: BatonConfig
    orchestrator: Orchestrator
    tokenizer: PromptTokenizer
    planner: Planner
    metrics: GatewayMetrics
    registry: CollectorRegistry
    lifecycle: Lifecycle
    model_id: str
    fingerprint: str
    """Changes with the weights: ``system_fingerprint`` of every answer."""
    started_at: int
    """Unix time, seconds."""
