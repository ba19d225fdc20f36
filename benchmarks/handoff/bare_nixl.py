"""The bound of the NIXL transport: one read of all the blocks, asked after without a pause, with
nothing around it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from baton.errors import TransferError
from baton.kv_layout import KvLayout
from benchmarks.handoff.cases import COPY_CORE
from benchmarks.handoff.processes import Memory, pin
from kv_transfer.memory import KvMemory
from kv_transfer.ranges import BlockRange
from kv_transfer.runs import Area, runs
from kv_transfer.transports import nixl, ucx

_START_S = 20.0
"""For a process to import what it needs, and to read a first block."""
_TRIES = 3
_LONGEST_S = 60.0
_CLOSE_S = 5.0
Address = tuple[str, bytes, int]
"""Of a serving agent: name, metadata, where its pool lies."""


class BareNixl:
    """One agent, and the pool that it reads into or that is read. Raises LinkError where there
    is no NIXL."""

    def __init__(self, layout: KvLayout, memory: KvMemory, *, name: str, serves: bool) -> None:
        self._layout = layout
        self._agent = nixl.Agent(
            name,
            layout=layout,
            memory=memory,
            environment=ucx.environment("127.0.0.1", "any", os.environ),
            serves=serves,
        )
        self._peer = ""
        self._source = self._agent.area

    @property
    def address(self) -> Address:
        """By which a reading one connects: name, metadata, where the pool lies."""
        return self._agent.name, self._agent.metadata, self._agent.area.address

    def connect(self, name: str, metadata: bytes, pool_address: int) -> None:
        self._agent.connect(metadata)
        self._peer, self._source = name, Area(self._layout, pool_address)

    def read(self, source_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        """Returns when all bytes have come."""
        end = len(blocks) * self._layout.block_size
        whole = BlockRange(0, end, tuple(source_blocks), tuple(blocks))
        handle = self._agent.read(self._peer, *runs(whole, self._agent.area, self._source))
        while not self._agent.is_done(handle):
            pass
        self._agent.release(handle)

    def close(self) -> None:
        self._agent.close()


class NixlAlone:
    """A process with a pool and an agent of its own, which reads from ``source``, the address of a
    serving one. A process, because UCX has been seen to lose a first read, and then neither to
    answer nor to let go: one that has not read within seconds is killed, and another started.

    Raises TransferError where none reads.
    """

    def __init__(self, layout: KvLayout, source: Address) -> None:
        self._layout = layout
        context = multiprocessing.get_context("spawn")
        for _ in range(_TRIES):
            self._connection, theirs = context.Pipe()
            arguments = (theirs, layout, source)
            self._process = context.Process(target=_read_for, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
            shown: Memory | None = self._answer(_START_S)
            if shown is not None:
                self.memory = shown.map(layout.num_bytes)
                return
            self._kill()
        raise TransferError(f"NIXL alone has read nothing, {_TRIES} times")

    def read(self, source_blocks: Sequence[int], blocks: Sequence[int]) -> float:
        """Reads them all and returns the seconds that it took. Raises TransferError."""
        seconds: float | None = None
        with suppress(BrokenPipeError):
            self._connection.send((source_blocks, blocks))
            seconds = self._answer(_LONGEST_S)
        if seconds is None:
            self._kill()  # or a late answer would be taken for a later read's
            raise TransferError("a bare read of NIXL has not come to its end")
        return seconds

    def close(self) -> None:
        self._connection.close()
        self._process.join(_CLOSE_S)
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _answer(self, timeout_s: float) -> Any:
        """None: there was none, or the process has ended."""
        try:
            return self._connection.recv() if self._connection.poll(timeout_s) else None
        except (EOFError, ConnectionResetError):
            return None


def _read_for(connection: Connection, layout: KvLayout, source: Address) -> None:
    """The process: until the other end of the pipe is closed."""
    memory = KvMemory(layout.num_bytes)
    agent = BareNixl(layout, memory, name=f"bare/{os.getpid()}", serves=False)
    agent.connect(*source)
    pin(COPY_CORE)
    agent.read([0], [0])
    np.frombuffer(memory.buffer, np.uint8)[:] = 0
    connection.send(Memory.of(memory))
    with suppress(EOFError):
        while True:
            source_blocks, blocks = connection.recv()
            began_at = time.perf_counter()
            agent.read(source_blocks, blocks)
            connection.send(time.perf_counter() - began_at)
    agent.close()
