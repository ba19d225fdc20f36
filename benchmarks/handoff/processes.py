"""What the benchmark's processes do alike: they keep to a core, and map each other's pools."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from kv_transfer.memory import KvMemory, map_read_only


@dataclass(frozen=True, slots=True)
class Memory:
    """Where a process' pool can be opened for reading, by the same user."""

    path: str

    @classmethod
    def of(cls, memory: KvMemory) -> Memory:
        """This process'."""
        return cls(f"/proc/{os.getpid()}/fd/{memory.fd}")

    def map(self, num_bytes: int) -> mmap.mmap:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return map_read_only(descriptor, num_bytes)
        finally:
            os.close(descriptor)


def pin(core: int) -> None:
    """This thread, and those that it starts, to one core; nothing where there is no such one."""
    if core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})
