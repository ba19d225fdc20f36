"""How fast does KV get from one process's GPU pool to another's, on one GPU, over CUDA IPC?"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from baton.errors import TransferError
from baton.faults import Faults
from baton.kv_layout import KvLayout
from benchmarks.gpu.report import Handoff
from benchmarks.handoff.shapes import SHAPES, Shape
from kv_transfer.gpu_memory import GpuBlocks, GpuMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.cuda_ipc_links import CudaIpcPull, CudaIpcServe
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

LOADS = ((1024, 1), (4096, 1), (16384, 1), (1024, 16))
"""Tokens of each request, requests at once."""
_ROUNDS = 7
_POOL_TOKENS = 16 * 2048
_START_S = 120.0


def handoffs(copied_bytes_per_s: float) -> Iterator[Handoff]:
    """``copied_bytes_per_s``: what the GPU copies, read and written. Raises TransferError."""
    for shape in SHAPES.values():
        yield from asyncio.run(_of_shape(shape, copied_bytes_per_s))


async def _of_shape(shape: Shape, copied_bytes_per_s: float) -> list[Handoff]:
    layout = shape.layout(_POOL_TOKENS // shape.layout(1).block_size)
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, layout), daemon=True)
    process.start()
    theirs.close()
    try:
        if not connection.poll(_START_S):
            raise TransferError("the process that serves a pool on the GPU did not start")
        return await _measured(shape, layout, connection.recv_bytes(), copied_bytes_per_s)
    except EOFError:
        raise TransferError("the process that serves a pool on the GPU failed") from None
    finally:
        connection.close()
        process.kill()
        process.join()


async def _measured(
    shape: Shape, layout: KvLayout, welcome: bytes, copied_bytes_per_s: float
) -> list[Handoff]:
    memory = GpuMemory(torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    blocks = GpuBlocks(layout, memory)
    pull = CudaIpcPull(pool=blocks, memory=memory, faults=Faults(None, "bench"))
    link: Any = await pull.connect(
        pb.PeerWelcome.FromString(welcome), layout, _raise_lost, Rendezvous(lambda *_: None)
    )
    found = []
    for num_tokens, requests in LOADS:
        ranges = _ranges(layout, num_tokens, requests)
        took = [await _timed(link, ranges) for _ in range(_ROUNDS)]
        num_bytes = requests * num_tokens * layout.token_bytes
        took_s = statistics.median(took[1:])
        fraction = 2 * num_bytes / took_s / copied_bytes_per_s
        row = (shape.title, num_tokens, requests, round(took_s * 1000, 3))
        found.append(Handoff(*row, num_bytes, round(fraction, 3)))
    _check_all_came(memory, layout)
    await link.close()
    await pull.close()
    return found


def _ranges(layout: KvLayout, num_tokens: int, requests: int) -> list[BlockRange]:
    """Of shuffled blocks on both sides."""
    drawn = random.Random(num_tokens)
    own, theirs = (list(range(layout.num_blocks)) for _ in range(2))
    drawn.shuffle(own)
    drawn.shuffle(theirs)
    each = num_tokens // layout.block_size
    return [
        BlockRange(0, num_tokens, tuple(theirs[at : at + each]), tuple(own[at : at + each]))
        for at in range(0, requests * each, each)
    ]


async def _timed(link: Any, ranges: list[BlockRange]) -> float:
    """Seconds from the first post to the last end."""
    loop = asyncio.get_running_loop()
    ends = [loop.create_future() for _ in ranges]

    began = time.perf_counter()
    for blocks, end in zip(ranges, ends, strict=True):
        link.post(blocks, posted=lambda: None, ended=end.set_result)
    errors = [error for error in await asyncio.gather(*ends) if error is not None]
    took_s = time.perf_counter() - began
    if errors:
        raise errors[0]
    return took_s


def _check_all_came(memory: GpuMemory, layout: KvLayout) -> None:
    """The sender's bytes are all 1: every block of the last load has come whole."""
    pool = memory.buffer[: layout.num_bytes].view(layout.num_blocks + 1, -1)
    last = [block for blocks in _ranges(layout, *LOADS[-1]) for block in blocks.blocks]
    if not bool((pool[last] == 1).all()):
        raise TransferError("a copy over CUDA IPC left bytes behind")


def _serve(connection: Connection, layout: KvLayout) -> None:
    """The process: until the other end of the pipe is closed."""
    memory = GpuMemory(torch.ones(layout.num_bytes, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    welcome = pb.PeerWelcome()
    serve = CudaIpcServe(memory=memory, layout=layout)
    asyncio.run(serve.open(welcome, _raise_lost, Rendezvous(lambda *_: None)))
    connection.send_bytes(welcome.SerializeToString())
    with suppress(EOFError):
        connection.recv_bytes()


def _raise_lost(reason: str) -> None:
    raise TransferError(f"the link is lost: {reason}")
