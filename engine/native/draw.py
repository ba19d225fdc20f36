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
from torch import Tensor

from baton.errors import InternalError
from engine.native.kernels import Kernels
from engine.sampling.params import SamplingParams

NO_DISTRIBUTION = "the model's logits are not numbers, or all of them infinite"


_ROW = struct.Struct("4dq")
"""The fields of ``RowToDraw`` in weights.h: uniform, temperature, min_p, top_p, top_k."""


def draw_tokens(
    kernels: Kernels, logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """One token id for each row of ``logits`` (float32 [rows, vocabulary], any distance between
    rows), by the uniform numbers in [0, 1) of those that are not greedy.

    Raises InternalError where logits are no distribution's.
    """
    num_rows, vocab_size = logits.shape
    assert num_rows == len(params) == len(uniforms)
    assert logits.dtype == torch.float32
    assert vocab_size > 0
    if logits.stride(1) != 1 and vocab_size > 1:
        logits = logits.contiguous()
    rows = b"".join(
        _ROW.pack(number, each.temperature, each.min_p, each.top_p, each.top_k)
        for number, each in zip(uniforms, params, strict=True)
    )
    token_ids = (c_int64 * num_rows)()
    _function(kernels).for_work(num_rows * vocab_size)(
        *(logits.data_ptr(), logits.stride(0), vocab_size, rows, num_rows, token_ids),
        torch.get_num_threads(),
    )
    chosen = list(token_ids)
    if min(chosen, default=0) < 0:
        raise InternalError(NO_DISTRIBUTION)
    return chosen


@lru_cache(maxsize=1)
def _function(kernels: Kernels) -> Any:
    rows = (c_void_p, c_int64, c_int64, c_char_p, c_int64)
    return kernels.function("draw_tokens", *rows, POINTER(c_int64), c_int)
