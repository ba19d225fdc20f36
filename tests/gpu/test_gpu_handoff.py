"""KV of one process's GPU pool, in another's over CUDA IPC: on one GPU, in float32."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

pytest.importorskip("gguf", reason="needs the package gguf, for tiny models")

from support.tiny_engine import generate, prompt, run_step, tiny_engine, tokens

from baton.errors import TransferError
from baton.faults import Faults
from engine.engine import Engine
from engine.gpu.plan import GpuPlan
from engine.sampling import on_device
from kv_transfer.gpu_memory import GpuBlocks, GpuMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.transports.cuda_ipc_links import CudaIpcPull, CudaIpcServe
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

NUM_TOKENS = 16 * 12 + 5
NUM_ANSWERED = 20
BLOCK_SIZE = 16
BUSY_CYCLES = 2_000_000_000
"""For which the GPU does nothing but count: about a second."""
START_S = 120.0


def gpu_engine() -> Engine:
    plan = GpuPlan(torch.device("cuda", 0), "triton", max_num_seqs=2, max_model_len=512)
    return tiny_engine(num_blocks=64, gpu=plan)


def memory_of(engine: Engine) -> GpuMemory:
    return GpuMemory(engine.kv.tensor.view(torch.uint8).flatten())


def nothing(*_: object) -> None: ...


def prefill(connection: Connection, waits: bool, num_busy_cycles: int) -> None:
    """The process: computes all of the prompt but its last token while the GPU is busy, and
    tells its blocks as soon as the step has returned."""
    if not waits:
        on_device._ToHost.wait = lambda told: told._host.tolist()  # type: ignore[method-assign]
    engine = gpu_engine()
    memory = memory_of(engine)
    welcome = pb.PeerWelcome()
    serve = CudaIpcServe(memory=memory, layout=engine.kv.layout)
    asyncio.run(serve.open(welcome, nothing, Rendezvous(nothing)))
    seq = prompt(tokens(NUM_TOKENS))
    torch.cuda.synchronize()
    torch.cuda._sleep(num_busy_cycles)
    run_step(engine, seq, NUM_TOKENS - 1)
    connection.send((welcome.SerializeToString(), seq.block_table))
    with contextlib.suppress(EOFError):
        connection.recv()


@contextlib.contextmanager
def prefilled(
    waits: bool = True, num_busy_cycles: int = 0
) -> Iterator[tuple[pb.PeerWelcome, list[int]]]:
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(theirs, waits, num_busy_cycles), daemon=True)
    process.start()
    theirs.close()
    try:
        assert connection.poll(START_S), "the prefill process did not start"
        welcome, block_ids = connection.recv()
        yield pb.PeerWelcome.FromString(welcome), block_ids
    finally:
        connection.close()
        process.join(START_S)
        process.kill()


async def pulled(engine: Engine, welcome: pb.PeerWelcome, blocks: BlockRange) -> None:
    memory = memory_of(engine)
    layout = engine.kv.layout
    pull = CudaIpcPull(
        pool=GpuBlocks(layout, memory), memory=memory, faults=Faults(None, "decode-0")
    )
    link = await pull.connect(welcome, layout, nothing, Rendezvous(nothing))
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
    with prefilled(waits, num_busy_cycles) as (welcome, block_ids):
        blocks = BlockRange(0, NUM_TOKENS - 1, tuple(block_ids), tuple(seq.block_table))
        await pulled(engine, welcome, blocks)
        seq.num_computed_tokens = NUM_TOKENS - 1
        at = slice(None, (NUM_TOKENS - 1) % BLOCK_SIZE)
        pool = engine.kv.tensor
        is_equal = torch.equal(pool[own.block_table[:-1]], pool[seq.block_table[:-1]])
        last, own_last = pool[seq.block_table[-1]], pool[own.block_table[-1]]
        is_equal &= torch.equal(last[..., at, :], own_last[..., at, :])
        return generate(engine, seq, NUM_ANSWERED), is_equal


async def test_what_is_pulled_from_another_process_is_answered_as_computed() -> None:
    told, is_equal = await answer(waits=True, num_busy_cycles=0)
    assert is_equal
    assert told == generate(tiny_engine(num_blocks=64), prompt(tokens(NUM_TOKENS)), NUM_ANSWERED)


@pytest.mark.parametrize("waits", [True, False], ids=["the-step-waits", "it-does-not"])
async def test_a_step_returns_when_the_gpu_has_written_its_kv(waits: bool) -> None:
    """Without the wait for the step's event others pull what is not there yet."""
    _, is_equal = await answer(waits, BUSY_CYCLES)
    assert is_equal == waits
