"""Tests that hold with the CPU kernels and without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.native.kernels import Choice, kernels, use_kernels


@contextmanager
def computing_with(choice: Choice) -> Iterator[None]:
    """What is made meanwhile computes with those; afterwards it is as before."""
    before: Choice = "torch" if kernels() is None else "native"
    use_kernels(choice)
    try:
        yield
    finally:
        use_kernels(before)
