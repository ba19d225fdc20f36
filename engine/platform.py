"""What this machine computes well, and what it need not keep in memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from baton.errors import ConfigurationError
from engine.gpu.device import CPU, preferred_gpu_dtype

# Instructions that multiply bfloat16 natively: x86 AVX-512 and AMX, ARM NEON and SVE.
# Without one, every bfloat16 product is emulated and slower than float32.
_BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

_DONTNEED = 4  # of madvise, on Linux
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} \S+ \S+ (\d+)")
"""The first line of a mapping in smaps: its range, and its file's inode, 0 for none."""

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_dtype(name: str, device: torch.device = CPU) -> torch.dtype:
    """The dtype of weights and KV for the setting ``engine.dtype``.

    ``auto`` is bfloat16 where the device multiplies in it, else float32.

    Raises:
        ConfigurationError: another name than auto, bfloat16 or float32.
    """
    if name == "auto":
        if device.type == "cuda":
            return preferred_gpu_dtype()
        return _preferred_dtype(torch.cpu.get_capabilities())
    if name not in _DTYPES:
        raise ConfigurationError(
            f"engine.dtype {name!r} is unknown; use auto, {', '.join(_DTYPES)}"
        )
    return _DTYPES[name]


def let_go_of_file_pages(tensor: torch.Tensor) -> None:
    """Takes the mapped file whose part ``tensor`` is out of this process's memory, if nothing
    has been written to it: what is read of it later comes from the kernel's cache of files,
    4 KiB and its neighbours at a time. A tensor that is no part of a file stays as it is."""
    address = tensor.untyped_storage().data_ptr()
    found = _mapping_of(address)
    if found is None:
        return
    start, end, is_clean_file = found
    if is_clean_file:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _mapping_of(address: int) -> tuple[int, int, bool] | None:
    """The mapping with this address, and whether it is a file's without pages of our own."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:  # another kernel than Linux
        return None
    found: tuple[int, int, bool] | None = None
    for line in lines:
        if header := _MAPPING.match(line):
            if found is not None:
                break
            start, end = int(header[1], 16), int(header[2], 16)
            if start <= address < end:
                found = start, end, header[3] != "0"
        elif found is not None and line.startswith("Anonymous:") and line.split()[1] != "0":
            found = found[0], found[1], False
    return found


def _preferred_dtype(capabilities: Mapping[str, Any]) -> torch.dtype:
    native = any(capabilities.get(name) for name in _BFLOAT16_CAPABILITIES)
    return torch.bfloat16 if native else torch.float32
