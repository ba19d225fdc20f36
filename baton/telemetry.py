"""Every Prometheus metric, declared once; recorded where it happens.

Each process makes its own ``CollectorRegistry`` and one of the three classes
below on it. Labels are bounded: workers, roles, outcomes, never requests.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_DECISION_BUCKETS_S = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05,
)  # fmt: skip
_LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class GatewayMetrics:
    """What a gateway knows of its requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "baton_requests",
            "Requests that ended, by how: ok, cancelled, or an error code",
            ["outcome"],
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "baton_requests_in_flight", "Requests begun and not ended", registry=registry
        )
        self.choices_queued = Gauge(
            "baton_choices_queued", "Choices waiting for admission", registry=registry
        )
        self.time_to_first_token = Histogram(
            "baton_time_to_first_token_seconds",
            "From a choice's submission to its first token",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "baton_inter_token_latency_seconds",
            "Between two tokens of one choice",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.attempts = Counter(
            "baton_attempts",
            "Attempts of choices: first, or repeated after an error code",
            ["cause"],
            registry=registry,
        )
        self.workers = Gauge(
            "baton_workers", "Workers with a live Session", ["role"], registry=registry
        )
        self.registry_up = Gauge(
            "baton_registry_up", "1 while Redis answers this gateway", registry=registry
        )
        self.gateways = Gauge(
            "baton_gateways", "Gateways of the cluster, this one included", registry=registry
        )
        self.peers_up = Gauge(
            "baton_peers_up",
            "1 while decisions are shared with other gateways",
            registry=registry,
        )
        self.peer_decisions = Counter(
            "baton_peer_decisions",
            "Decisions for a worker, told to other gateways (sent) or by them (received)",
            ["direction"],
            registry=registry,
        )
        self.routing_decisions = Counter(
            "baton_routing_decisions",
            "Pairings: disaggregated, or local to the decode worker",
            ["kind"],
            registry=registry,
        )
        self.routing_seconds = Histogram(
            "baton_routing_decision_seconds",
            "One decision of the routing policy",
            buckets=_DECISION_BUCKETS_S,
            registry=registry,
        )
        self.handoff_exposed = Histogram(
            "baton_handoff_exposed_seconds",
            "What a hand-off added to the gap before the second token",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.kv_index_blocks = Gauge(
            "baton_kv_index_blocks",
            "Blocks that this gateway's KV index holds, over all workers",
            ["role"],
            registry=registry,
        )
        self.kv_index_events = Counter(
            "baton_kv_index_events",
            "Messages of workers on what their prefix caches hold",
            registry=registry,
        )
        self.kv_index_snapshot_requests = Counter(
            "baton_kv_index_snapshot_requests",
            "Snapshots asked of workers after a gap in their messages",
            registry=registry,
        )


class WorkerMetrics:
    """What a worker knows of its engine and its hand-offs."""

    def __init__(self, registry: CollectorRegistry, *, worker_id: str, role: str) -> None:
        labels = {"worker": worker_id, "role": role}
        names = list(labels)
        kv_blocks = Gauge(
            "baton_kv_blocks",
            "Blocks of the KV pool by state",
            [*names, "state"],
            registry=registry,
        )
        self.kv_blocks = {
            state: kv_blocks.labels(**labels, state=state)
            for state in ("free", "cached", "referenced", "quarantined")
        }
        handoff_bytes = Counter(
            "baton_kv_handoff_bytes",
            "KV bytes handed over and acknowledged",
            [*names, "transport", "direction"],
            registry=registry,
        )
        self.handoff_bytes = {
            (transport, direction): handoff_bytes.labels(
                **labels, transport=transport, direction=direction
            )
            for transport in ("shared_memory", "cuda_ipc", "nixl", "gloo")
            for direction in ("sent", "received")
        }
        self.handoff_seconds = Histogram(
            "baton_kv_handoff_seconds",
            "From a transfer's commit record to its blocks being usable: hand-offs on decode, "
            "pulls on prefill",
            names,
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        ).labels(**labels)
        handoffs = Counter(
            "baton_kv_handoffs",
            "Hand-offs that ended, by how",
            [*names, "outcome"],
            registry=registry,
        )
        self.handoffs: Callable[[str], Counter] = lambda outcome: handoffs.labels(
            **labels, outcome=outcome
        )
        pulls = Counter(
            "baton_kv_pulls",
            "On prefill, pulls of what decode workers lend that ended: ready, connecting (a pair's "
            "first), late (computing would have been done), cancelled, or an error code",
            [*names, "outcome"],
            registry=registry,
        )
        self.pulls: Callable[[str], Counter] = lambda outcome: pulls.labels(
            **labels, outcome=outcome
        )
        prompt_tokens = Counter(
            "baton_prompt_tokens",
            "Input tokens by where their KV came from",
            [*names, "source"],
            registry=registry,
        )
        self.prompt_tokens = {
            source: prompt_tokens.labels(**labels, source=source)
            for source in ("computed", "cached", "received")
        }
        self.output_tokens = Counter(
            "baton_output_tokens", "Tokens sampled", names, registry=registry
        ).labels(**labels)
        self.steps = Counter("baton_engine_steps", "Engine steps", names, registry=registry).labels(
            **labels
        )
        self.step_seconds = Histogram(
            "baton_engine_step_seconds",
            "Duration of an engine step",
            names,
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        ).labels(**labels)
        self.running = Gauge(
            "baton_sequences_running",
            "Sequences that have their blocks: computed or, on decode, handed over",
            names,
            registry=registry,
        ).labels(**labels)
        self.waiting = Gauge(
            "baton_sequences_waiting",
            "Sequences without blocks: on decode they wait for room, on prefill for that too",
            names,
            registry=registry,
        ).labels(**labels)
        self.preemptions = Counter(
            "baton_preemptions", "Sequences that gave up their blocks", names, registry=registry
        ).labels(**labels)


class ControllerMetrics:
    """What the pool controller knows of its pools."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = ["pool", "role"]
        self.desired = Gauge(
            "baton_pool_desired_workers", "Workers that there should be", names, registry=registry
        )
        self.running = Gauge(
            "baton_pool_running_workers",
            "Workers that have a process, without those that are leaving",
            names,
            registry=registry,
        )
        self.ready = Gauge(
            "baton_pool_ready_workers", "Of these, the registered ones", names, registry=registry
        )
        self.leaving = Gauge(
            "baton_pool_leaving_workers", "Workers that drain and go", names, registry=registry
        )
        self.replacements = Counter(
            "baton_worker_replacements",
            "Workers that had to be replaced: died, fenced (registration lost) or start_timeout",
            ["pool", "cause"],
            registry=registry,
        )
        self.wishes = Counter(
            "baton_scale_wishes",
            "Wishes for other sizes: accepted, refused, or unavailable",
            ["outcome"],
            registry=registry,
        )
