"""KV of one process's GPU pool, in another's over CUDA IPC: on one GPU, in float32."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from support.gpu_prefill import NUM_TOKENS, gpu_engine, memory_of, nothing, serve
from support.tiny_engine import generate, prompt, run_step, tiny_engine, tokens

from baton.errors import TransferError
from baton.faults import Faults
from engine.engine import Engine
from kv_transfer.gpu_memory import GpuBlocks
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.cuda_ipc_links import CudaIpcPull
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

NUM_ANSWERED = 20
BLOCK_SIZE = 16
BUSY_CYCLES = 6_000_000_000
"""For which the GPU does nothing but count: some three seconds."""
START_S = 120.0


@contextlib.contextmanager
def prefilled(
    waits: bool = True, num_busy_cycles: int = 0
) -> Iterator[tuple[pb.PeerWelcome, list[int]]]:
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, waits, num_busy_cycles), daemon=True)
    process.start()
    theirs.close()
    try:
        assert connection.poll(START_S), "the prefill process did not start"
        welcome, block_ids = connection.recv()
        yield pb.PeerWelcome.FromString(welcome), block_ids
    finally:
        connection.close()
        process.kill()
        process.join()


async def puller(engine: Engine) -> CudaIpcPull:
    memory, layout = memory_of(engine), engine.kv.layout
    pull = CudaIpcPull(
        pool=GpuBlocks(layout, memory), memory=memory, faults=Faults(None, "decode-0")
    )
    await pull.start()
    return pull


async def pulled(
    engine: Engine, pull: CudaIpcPull, welcome: pb.PeerWelcome, blocks: BlockRange
) -> None:
    link = await pull.connect(welcome, engine.kv.layout, nothing, Rendezvous(nothing))
    ended: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
    link.post(blocks, posted=nothing, ended=ended.set_result)
    error = await ended
    await link.close()
    await pull.close()
    assert error is None, error


async def answer(waits: bool, num_busy_cycles: int) -> tuple[list[int], bool]:
    """Of a decode worker that has pulled the prompt but its last token, and whether it has the
    KV that it would have computed."""
    engine = gpu_engine()
    own, seq = prompt(tokens(NUM_TOKENS)), prompt(tokens(NUM_TOKENS))
    run_step(engine, own, NUM_TOKENS - 1)
    assert engine.kv.ensure_blocks(seq, NUM_TOKENS - 1)
    torch.cuda.synchronize()
    pull = await puller(engine)
    with prefilled(waits, num_busy_cycles) as (welcome, block_ids):
        blocks = BlockRange(0, NUM_TOKENS - 1, tuple(block_ids), tuple(seq.block_table))
        await pulled(engine, pull, welcome, blocks)
        seq.num_computed_tokens = NUM_TOKENS - 1
        at = slice(None, (NUM_TOKENS - 1) % BLOCK_SIZE)
        pool = engine.kv.tensor
        is_equal = torch.equal(pool[own.block_table[:-1]], pool[seq.block_table[:-1]])
        last, own_last = pool[seq.block_table[-1]], pool[own.block_table[-1]]
        is_equal &= torch.equal(last[..., at, :], own_last[..., at, :])
        return generate(engine, seq, NUM_ANSWERED), is_equal


def test_what_is_pulled_from_another_process_is_answered_as_computed() -> None:
    told, is_equal = asyncio.run(answer(waits=True, num_busy_cycles=0))
    assert is_equal
    assert told == generate(tiny_engine(num_blocks=64), prompt(tokens(NUM_TOKENS)), NUM_ANSWERED)


@pytest.mark.parametrize("waits", [True, False], ids=["the-step-waits", "it-does-not"])
def test_a_step_returns_when_the_gpu_has_written_its_kv(waits: bool) -> None:
    """Without the wait for the step's event others pull what is not there yet."""
    _, is_equal = asyncio.run(answer(waits, BUSY_CYCLES))
    assert is_equal == waits
