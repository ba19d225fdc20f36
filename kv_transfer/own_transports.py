"""The transports of one worker: which there are depends on where its KV lies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from baton.config import KvTransferConfig
from baton.faults import Faults
from baton.kv_layout import KvLayout
from kv_transfer.blocks import CheckedBlocks, CopyBlocks, PoolView
from kv_transfer.memory import KvMemory
from kv_transfer.transports.base import OnFatal, PullTransport, ServeTransport
from kv_transfer.transports.cuda_ipc_links import CudaIpcPull, CudaIpcServe
from kv_transfer.transports.gloo_links import GlooPull, GlooServe
from kv_transfer.transports.nixl_links import NixlPull, NixlServe
from kv_transfer.transports.shared_memory import SharedMemoryPull, SharedMemoryServe

if TYPE_CHECKING:
    from kv_transfer.gpu_memory import GpuMemory


def checked_blocks(layout: KvLayout, memory: KvMemory | GpuMemory) -> CheckedBlocks:
    if isinstance(memory, KvMemory):
        return PoolView(layout, memory.buffer)
    module = importlib.import_module("kv_transfer.gpu_memory")  # needs torch
    blocks: CheckedBlocks = module.GpuBlocks(layout, memory)
    return blocks


def pull_transports(
    *,
    name: str,
    layout: KvLayout,
    memory: KvMemory | GpuMemory,
    secret: str,
    host: str,
    config: KvTransferConfig,
    faults: Faults,
    on_fatal: OnFatal,
    copy_blocks: CopyBlocks | None,
) -> dict[str, PullTransport]:
    """Decode's sides, by their names. ``name`` is this very process's, among all."""
    timeout_s = config.operation_s
    pool: CheckedBlocks
    same_host: PullTransport
    if isinstance(memory, KvMemory):
        pool = own = PoolView(layout, memory.buffer, copy_blocks=copy_blocks)
        same_host = SharedMemoryPull(pool=own, secret=secret, timeout_s=timeout_s, faults=faults)
    else:
        pool = checked_blocks(layout, memory)
        same_host = CudaIpcPull(pool=pool, memory=memory, faults=faults)
    transports = [
        same_host,
        NixlPull(
            name=name,
            pool=pool,
            memory=memory,
            host=host,
            config=config,
            faults=faults,
            on_fatal=on_fatal,
        ),
        GlooPull(pool=pool, memory=memory, host=host, timeout_s=timeout_s, faults=faults),
    ]
    return {each.name: each for each in transports}


def serve_transports(
    *,
    name: str,
    layout: KvLayout,
    memory: KvMemory | GpuMemory,
    secret: str,
    host: str,
    config: KvTransferConfig,
    faults: Faults,
) -> dict[str, ServeTransport]:
    """Prefill's sides, by their names; ``name`` as for ``pull_transports``."""
    timeout_s = config.operation_s
    same_host: ServeTransport
    if isinstance(memory, KvMemory):
        same_host = SharedMemoryServe(
            memory=memory, layout=layout, secret=secret, timeout_s=timeout_s
        )
    else:
        same_host = CudaIpcServe(memory=memory, layout=layout)
    transports = [
        same_host,
        NixlServe(name=name, memory=memory, layout=layout, host=host, config=config),
        GlooServe(memory=memory, layout=layout, host=host, timeout_s=timeout_s, faults=faults),
    ]
    return {each.name: each for each in transports}
