"""How many bytes of KV make a pool of a share of the working set."""

from __future__ import annotations

from collections.abc import Sequence

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from baton.kv_layout import KvLayout
from benchmarks.routing.oracle import Asked, working_set

BLOCK_SIZE = 16
NUM_WORKERS = 2
"""Of each pool."""


def worker_blocks(requests: Sequence[Asked], share: float) -> int:
    """Blocks of one worker, where each pool (prefill, and decode) has, all its workers
    together, ``share`` of the distinct blocks that the requests ever fill."""
    return int(share * working_set(requests, BLOCK_SIZE)) // NUM_WORKERS


def kv_cache_bytes(num_blocks: int) -> int:
    """What gives a worker of the embedded model exactly that many blocks at fp32."""
    model = open_checkpoint(DEFAULT_MODEL).config
    layout = KvLayout(
        num_blocks, model.num_kv_heads, model.num_layers, BLOCK_SIZE, model.head_dim, "float32"
    )
    return layout.num_bytes
