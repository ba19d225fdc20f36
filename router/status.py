"""What the orchestrator knows of the cluster, as ``/status`` and ``/ready`` show it."""

from __future__ import annotations

from dataclasses import dataclass

from baton.records import Role


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, as its record and its last report say."""

    worker_id: str
    role: Role
    epoch: str
    """In hexadecimal."""
    address: str
    ready: bool
    """Its Session is live and it may be given work."""
    model: str
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    num_referenced_blocks: int
    num_quarantined_blocks: int
    num_blocks: int
    block_size: int
    max_model_len: int
    generation: str
    last_report_age_s: float | None
    """None before its first report."""
    num_ranks: int = 1
    """Processes that compute together as this worker."""
    num_indexed_blocks: int = 0
    """Blocks that this gateway's KV index says the prefix cache holds."""
    draining: bool = False
    """It has said that it is leaving: its streams go on, and it gets no new ones."""
    num_peer_sequences: int = 0
    """What other gateways have given it since its last report, as routing counts it now."""
    num_peer_tokens: int = 0
    num_peer_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All workers; ready when ``missing`` is empty."""

    workers: tuple[WorkerStatus, ...]
    registry_up: bool
    missing: tuple[str, ...] = ()
    """A sentence for each thing that is still missing."""
    degraded: tuple[str, ...] = ()
    """A sentence for each thing without which it serves, but not as well as it could."""
    gateways: tuple[str, ...] = ()
    """Ids of those that live, this one included, as the registry last said."""
    recent_max_model_len: int | None = None
    """Like ``max_model_len``, with the decode workers that were ready until lately."""

    @property
    def ready(self) -> bool:
        return not self.missing

    @property
    def max_model_len(self) -> int | None:
        """Tokens of the longest prompt and answer together that the ready workers can serve;
        None while no decode worker is ready. It is what the largest decode worker holds: a
        prompt that no prefill worker holds is prefilled there."""
        return self.longest("decode")

    def longest(self, role: Role) -> int | None:
        """What the largest ready worker of that role holds; None while none is ready."""
        lengths = [w.max_model_len for w in self.workers if w.ready and w.role == role]
        return max(lengths, default=None)
