"""What a process does with its memory once it is made and before it serves."""

from __future__ import annotations

import ctypes
import gc


def leave_to_last() -> None:
    """Takes what is alive now out of the garbage collector's sight: it lives as long as the
    process. To look through all of it, some hundred thousand objects, stops every stream for as
    long as several steps. For processes only: whatever is dropped later and is part of a cycle
    stays."""
    gc.collect()
    gc.freeze()


def release_free_memory() -> None:
    """Gives the kernel back what nobody uses: after a model's weights were loaded and laid out
    anew up to hundreds of MB, after its tokenizer was read 14. Only glibc is asked; others keep
    little."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
