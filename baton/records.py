"""What a worker says of itself in the registry (Redis), and where it says it.

A record lives under ``worker_key`` with a time to live that every heartbeat
renews: a worker that stops beating is forgotten without anybody's help. Redis may be
shared with others, and large, so nobody searches it: ``index_key`` lists the keys.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["prefill", "decode"]


class WorkerRecord(BaseModel):
    """One registered worker. Addresses are ``host:port``; the epoch is hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    worker_id: str
    role: Role
    epoch: str
    protocol_version: int
    generation: str
    address: str
    """Of the Session service, and of the Transfer service."""
    metrics_address: str
    model: str
    digest: str
    block_size: int
    num_blocks: int
    max_model_len: int
    num_ranks: int = 1
    """Processes that compute together as this worker; ``pid`` is the first one's."""
    pid: int
    host: str
    started_at: float
    """Unix time, seconds."""


def worker_key(cluster: str, worker_id: str) -> str:
    """Redis key of a worker's record."""
    return f"baton:{cluster}:worker:{worker_id}"


def gateway_key(cluster: str, gateway_id: str) -> str:
    """Redis key of a gateway's presence."""
    return f"baton:{cluster}:gateway:{gateway_id}"


def index_key(cluster: str) -> str:
    """Redis key of the set of all worker and gateway keys of a cluster. Whoever renews a key
    adds it anew, so an index that is lost is soon whole again; readers take out what has
    expired."""
    return f"baton:{cluster}:index"


class PoolWish(BaseModel):
    """How large one pool should be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    replicas: int = Field(ge=0)
    configured: int = Field(ge=0)
    """What the configuration said when this was written. Once it says otherwise, it wins:
    the newer word counts."""


class PoolWishes(BaseModel):
    """What the pool controller keeps in Redis, under ``pools_key``, without expiry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pools: dict[str, PoolWish]


def context_needed(
    role: Role, *, num_prompt_tokens: int, num_emitted_tokens: int, max_tokens: int
) -> int:
    """What of its ``max_model_len`` a worker of that role needs for a choice: a decode worker
    prompt and whole answer; a prefill worker the input, which is the prompt and what earlier
    attempts have emitted, and the one token that it samples."""
    if role == "decode":
        return num_prompt_tokens + max_tokens
    return num_prompt_tokens + num_emitted_tokens + 1


def pools_key(cluster: str) -> str:
    """Redis key of the pools' desired sizes; the pool controller alone writes it."""
    return f"baton:{cluster}:pools"


def decisions_channel(cluster: str) -> str:
    """Redis channel on which gateways tell each other what they gave to which worker."""
    return f"baton:{cluster}:decisions"
