"""A decode scheduler and streams for it, without a worker around them."""

from __future__ import annotations

from support.sequences import sequence

from baton.v1 import session_pb2 as pb
from baton.worker.session_server import StreamKey
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from engine.intake import StopRule
from engine.kv_cache.kv_cache import KvCache
from kv_transfer.keys import TransferKey


def stream(
    number: int,
    tokens: list[int],
    *,
    max_tokens: int = 8,
    local: bool,
    num_emitted: int = 0,
    priority: int = 0,
) -> DecodeStream:
    key = StreamKey(1, number)
    return DecodeStream(
        key=key,
        request_id=f"request-{number}",
        sequence=sequence(key, tokens, len(tokens) - num_emitted),
        stop=StopRule(max_tokens, frozenset()),
        deadline=1e9,
        transfer=None if local else TransferKey(bytes([number]), 0, b"p", b"d"),
        handoff=None if local else pb.Handoff(),
        queued_at=0.0,
        priority=priority,
        num_input_tokens=len(tokens),
    )


def scheduler(kv: KvCache, *, budget: int = 16, most: int = 8) -> DecodeScheduler:
    return DecodeScheduler(kv, max_num_batched_tokens=budget, max_num_seqs=most, watermark_blocks=1)


def finish(kv: KvCache, chosen: DecodeScheduler, done: DecodeStream) -> None:
    chosen.remove(done)
    kv.free(done.sequence)
