"""Memory that the C library keeps for later."""

from __future__ import annotations

import ctypes


def release_free_memory() -> None:
    """Gives the kernel back what nobody uses: after a model's weights were loaded and laid out
    anew up to hundreds of MB, after its tokenizer was read 14. Only glibc is asked; others keep
    little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
