"""Another process's memory of a GPU: the only file of the hand-off that calls CUDA's driver.

An allocation is exported as a handle of 64 bytes, which any process of the machine that is told
it can open; opening maps it for reading and writing alike. It leaves nothing behind when either
process is killed. (torch's own way to share tensors counts their users in files of /dev/shm,
which a process that is killed leaves there.)
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

from kv_transfer.transports.base import LinkError

HANDLE_BYTES = 64
"""``CU_IPC_HANDLE_SIZE``."""


def _load() -> Any:
    """The driver's functions. Raises LinkError where they are not to be had."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise LinkError(
            f"the package cuda-bindings cannot be loaded ({error}): pip install cuda-bindings"
        ) from error


class Gpu:
    """One GPU, for one thread, and a stream of its own: copies run beside the engine's kernels.

    Args:
        device: this process's number of it.

    All methods raise LinkError, with the driver's reason.
    """

    def __init__(self, device: int) -> None:
        self._driver = driver = _load()
        self._do("cuInit", 0)
        # torch computes in the primary context too.
        context = self._do("cuDevicePrimaryCtxRetain", self._do("cuDeviceGet", device))
        self._do("cuCtxSetCurrent", context)
        self._stream = self._do(
            "cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        )

    def export(self, address: int) -> tuple[bytes, int]:
        """The handle of the allocation that ``address`` lies in, and how far in."""
        base, _ = self._do("cuMemGetAddressRange", address)
        handle = self._do("cuIpcGetMemHandle", base)
        return ctypes.string_at(handle.getPtr(), HANDLE_BYTES), address - int(base)

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation; its address here, until ``close``."""
        if len(handle) != HANDLE_BYTES:
            raise LinkError(f"a handle has {HANDLE_BYTES} bytes, the peer's {len(handle)}")
        opened = self._driver.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        lazily = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        return int(self._do("cuIpcOpenMemHandle", opened, lazily))

    def num_bytes(self, address: int) -> int:
        """From there to the end of its allocation."""
        base, size = self._do("cuMemGetAddressRange", address)
        return int(base) + int(size) - address

    def close(self, address: int) -> None:
        self._do("cuIpcCloseMemHandle", address)

    def copy(self, into: int, out_of: int, num_bytes: int) -> None:
        """Begins a copy between addresses of GPUs; ``wait`` ends it."""
        self._do("cuMemcpyDtoDAsync", into, out_of, num_bytes, self._stream)

    def copy_rows(self, into: int, out_of: int, *, num_rows: int, width: int, pitch: int) -> None:
        """Begins to copy the first ``width`` bytes of rows that begin every ``pitch`` bytes."""
        driver, rows = self._driver, self._driver.CUDA_MEMCPY2D()
        rows.srcMemoryType = rows.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        rows.srcDevice, rows.dstDevice = out_of, into
        rows.srcPitch = rows.dstPitch = pitch
        rows.WidthInBytes, rows.Height = width, num_rows
        self._do("cuMemcpy2DAsync", rows, self._stream)

    def wait(self) -> None:
        """Returns when every copy that was begun has written all its bytes."""
        self._do("cuStreamSynchronize", self._stream)

    def _do(self, name: str, *arguments: Any) -> Any:
        """What the driver's function returns besides its result: nothing, one value or several."""
        try:
            result, *values = getattr(self._driver, name)(*arguments)
        except Exception as error:  # where there is no driver, the package's own errors
            raise LinkError(f"CUDA's driver cannot be used: {error}") from error
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise LinkError(f"{name} failed: {getattr(result, 'name', result)}")
        return values[0] if len(values) == 1 else tuple(values)
