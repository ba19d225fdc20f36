"""What the hand-off calls of ``cuda.bindings.driver``, over this process's own memory.

A copy is done by ``cuStreamSynchronize`` alone, so that whoever does not wait for it sees old
bytes. An allocation, one of ``gpu_pool``, is exported as its address.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.gpu_memory import GpuMemory
from kv_transfer.transports import cuda_ipc


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_UNKNOWN = 999


class CUstream_flags(enum.Enum):
    CU_STREAM_NON_BLOCKING = 1


class CUipcMem_flags(enum.Enum):
    CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1


class CUmemorytype(enum.Enum):
    CU_MEMORYTYPE_DEVICE = 2


class CUipcMemHandle:
    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(cuda_ipc.HANDLE_BYTES)

    def getPtr(self) -> int:
        return ctypes.addressof(self._bytes)


class CUDA_MEMCPY2D:
    """Fields are set on it."""


Done = tuple[Any, ...]

_allocated: list[tuple[int, int]] = []
_BEFORE_POOLS = 512


def gpu_pool(num_bytes: int) -> tuple[GpuMemory, np.ndarray]:
    """A pool in an allocation that is larger, as torch's are, and its bytes."""
    allocation = torch.zeros(_BEFORE_POOLS + num_bytes + 64, dtype=torch.uint8)
    _allocated.append((allocation.data_ptr(), allocation.numel()))
    pool = allocation[_BEFORE_POOLS : _BEFORE_POOLS + num_bytes]
    return GpuMemory(pool), pool.numpy()


class StandinDriver:
    """``fails``: functions, by name, that fail. ``opened``: allocations that are mapped."""

    CUresult, CUstream_flags, CUipcMem_flags = CUresult, CUstream_flags, CUipcMem_flags
    CUmemorytype, CUipcMemHandle, CUDA_MEMCPY2D = CUmemorytype, CUipcMemHandle, CUDA_MEMCPY2D

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.opened: list[int] = []
        self.num_copies = 0
        self._queued: list[Callable[[], object]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name in self.fails:
            return lambda *arguments: (CUresult.CUDA_ERROR_UNKNOWN,)
        return super().__getattribute__(name)

    def cuInit(self, flags: int) -> Done:
        return (CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Done:
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, device: int) -> Done:
        return CUresult.CUDA_SUCCESS, "context"

    def cuCtxSetCurrent(self, context: str) -> Done:
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> Done:
        return CUresult.CUDA_SUCCESS, "stream"

    def cuMemGetAddressRange(self, address: int) -> Done:
        for base, size in _allocated:
            if base <= address < base + size:
                return CUresult.CUDA_SUCCESS, base, size
        return CUresult.CUDA_ERROR_INVALID_VALUE, None, None

    def cuIpcGetMemHandle(self, base: int) -> Done:
        handle = CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), base.to_bytes(cuda_ipc.HANDLE_BYTES, "little"), 64)
        return CUresult.CUDA_SUCCESS, handle

    def cuIpcOpenMemHandle(self, handle: CUipcMemHandle, flags: int) -> Done:
        base = int.from_bytes(ctypes.string_at(handle.getPtr(), 64), "little")
        if base not in [region for region, _ in _allocated]:
            return CUresult.CUDA_ERROR_INVALID_VALUE, None
        self.opened.append(base)
        return CUresult.CUDA_SUCCESS, base

    def cuIpcCloseMemHandle(self, base: int) -> Done:
        self.opened.remove(base)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyDtoDAsync(self, into: int, out_of: int, num_bytes: int, stream: str) -> Done:
        self._queue(into, out_of, num_bytes)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpy2DAsync(self, rows: Any, stream: str) -> Done:
        assert rows.srcMemoryType is rows.dstMemoryType is CUmemorytype.CU_MEMORYTYPE_DEVICE
        for row in range(rows.Height):
            into, out_of = (
                start + row * pitch
                for start, pitch in (
                    (rows.dstDevice, rows.dstPitch),
                    (rows.srcDevice, rows.srcPitch),
                )
            )
            self._queue(into, out_of, rows.WidthInBytes)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: str) -> Done:
        for copy in self._queued:
            copy()
        self._queued.clear()
        return (CUresult.CUDA_SUCCESS,)

    def _queue(self, into: int, out_of: int, num_bytes: int) -> None:
        self.num_copies += 1
        for address in (into, out_of):
            _, base, size = self.cuMemGetAddressRange(address)
            assert base is not None, "outside of every allocation"
            assert address + num_bytes <= base + size, "beyond its allocation"
        self._queued.append(lambda: ctypes.memmove(into, out_of, num_bytes))


@pytest.fixture
def cuda_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandinDriver]:
    """The driver, as long as the test runs."""
    driver = StandinDriver()
    monkeypatch.setattr(cuda_ipc, "_load", lambda: driver)
    yield driver
    _allocated.clear()
