"""A process that computes a prompt on the GPU and lets another pull its KV over CUDA IPC."""

from __future__ import annotations

import asyncio
import contextlib
from multiprocessing.connection import Connection

import torch
from support.tiny_engine import prompt, run_step, tiny_engine, tokens

from engine.engine import Engine
from engine.gpu.plan import GpuPlan
from engine.sampling import on_device
from kv_transfer.gpu_memory import GpuMemory
from kv_transfer.transports.cuda_ipc_links import CudaIpcServe
from kv_transfer.transports.rendezvous import Rendezvous
from kv_transfer.v1 import transfer_pb2 as pb

NUM_TOKENS = 16 * 12 + 5


def gpu_engine() -> Engine:
    plan = GpuPlan(torch.device("cuda", 0), "triton", max_num_seqs=2, max_model_len=512)
    return tiny_engine(num_blocks=64, gpu=plan)


def memory_of(engine: Engine) -> GpuMemory:
    return GpuMemory(engine.kv.tensor.view(torch.uint8).flatten())


def nothing(*_: object) -> None: ...


def serve(connection: Connection, waits: bool, num_busy_cycles: int) -> None:
    """The process: computes all of the prompt but its last token while the GPU is busy, and
    tells its blocks as soon as the step has returned. Without ``waits`` that is at once."""
    engine = gpu_engine()
    memory = memory_of(engine)
    welcome = pb.PeerWelcome()
    serving = CudaIpcServe(memory=memory, layout=engine.kv.layout)
    asyncio.run(serving.open(welcome, nothing, Rendezvous(nothing)))
    before = prompt(tokens(NUM_TOKENS, seed=1))
    run_step(engine, before, NUM_TOKENS - 1)  # what a step of this size takes is taken
    engine.kv.free(before)
    seq = prompt(tokens(NUM_TOKENS))
    if not waits:
        from engine.gpu import steps  # needs triton

        steps.Launched.wait = nothing  # type: ignore[method-assign]
        told = on_device._ToHost
        told.wait = lambda self: [0] * self._host.numel()  # type: ignore[method-assign]
    torch.cuda.synchronize()
    torch.cuda._sleep(num_busy_cycles)
    run_step(engine, seq, NUM_TOKENS - 1)
    connection.send((welcome.SerializeToString(), seq.block_table))
    with contextlib.suppress(EOFError):
        connection.recv()
