"""What this machine computes well, and what its C library keeps."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from baton.errors import ConfigurationError
from engine.gpu.device import CPU, preferred_gpu_dtype

# Instructions that multiply bfloat16 natively: x86 AVX-512 and AMX, ARM NEON and SVE.
# Without one, every bfloat16 product is emulated and slower than float32.
_BFLOAT16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")

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


def release_free_memory() -> None:
    """Gives the kernel back what the C library keeps for later: after a model's weights were
    loaded and laid out anew, up to hundreds of MB. Only glibc is asked; others keep little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _preferred_dtype(capabilities: Mapping[str, Any]) -> torch.dtype:
    native = any(capabilities.get(name) for name in _BFLOAT16_CAPABILITIES)
    return torch.bfloat16 if native else torch.float32
