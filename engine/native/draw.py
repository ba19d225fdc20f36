"""Tokens drawn by the CPU kernel: the Python side of draw.h.

``engine.sampling.draw`` says what is drawn from, and draws with torch where there is no kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch

from baton.errors import InternalError
from engine.logits import Logits
from engine.native.kernels import PANEL, Kernels
from engine.sampling.params import SamplingParams

NO_DISTRIBUTION = "the model's logits are not numbers, or all of them infinite"


_ROW = struct.Struct("4dq")
"""The fields of ``RowToDraw`` in weights.h: uniform, temperature, min_p, top_p, top_k."""


def draw_tokens(
    kernels: Kernels, logits: Logits, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """One token id for each row of ``logits`` (any distance between rows), by the uniform numbers
    in [0, 1) of those that are not greedy.

    Raises InternalError where logits are no distribution's.
    """
    values, told = logits.values, logits.highest
    num_rows, vocab_size = values.shape
    assert num_rows == len(params) == len(uniforms)
    assert values.dtype == torch.float32
    assert vocab_size > 0
    if values.stride(1) != 1 and vocab_size > 1:
        values = values.contiguous()
    if told is not None:
        assert told.dtype == torch.float32
        assert told.shape == (num_rows, -(-vocab_size // PANEL))
        told = told.contiguous()
    rows = b"".join(
        _ROW.pack(number, each.temperature, each.min_p, each.top_p, each.top_k)
        for number, each in zip(uniforms, params, strict=True)
    )
    token_ids = (c_int64 * num_rows)()
    _function(kernels).for_work(num_rows * vocab_size)(
        *(values.data_ptr(), values.stride(0)),
        *((None, 0) if told is None else (told.data_ptr(), told.stride(0))),
        *(vocab_size, rows, num_rows, token_ids),
        torch.get_num_threads(),
    )
    chosen = list(token_ids)
    if min(chosen, default=0) < 0:
        raise InternalError(NO_DISTRIBUTION)
    return chosen


@lru_cache(maxsize=1)
def _function(kernels: Kernels) -> Any:
    logits = (c_void_p, c_int64, c_void_p, c_int64, c_int64)
    return kernels.function("draw_tokens", *logits, c_char_p, c_int64, POINTER(c_int64), c_int)
