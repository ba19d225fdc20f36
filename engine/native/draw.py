"""Tokens drawn by the CPU kernel: the Python side of draw.h.

``engine.sampling.draw`` says what is drawn from, and draws with torch where there is no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from baton.errors import InternalError
from engine.native.kernels import Kernels
from engine.sampling.params import SamplingParams

LEAST_TEMPERATURE = 1e-30
"""Above float32's subnormal numbers; any one this low leaves the maximum alone."""
NO_DISTRIBUTION = "the model's logits are not numbers, or all of them infinite"


class _Row(Structure):
    _fields_ = (
        *((name, c_double) for name in ("uniform", "temperature", "min_p", "top_p")),
        ("top_k", c_int64),
    )


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
    rows = (_Row * num_rows)(*map(_row, params, uniforms))
    token_ids = (c_int64 * num_rows)()
    _function(kernels).for_work(num_rows * vocab_size)(
        *(logits.data_ptr(), logits.stride(0), vocab_size, rows, num_rows, token_ids),
        torch.get_num_threads(),
    )
    chosen = list(token_ids)
    if min(chosen, default=0) < 0:
        raise InternalError(NO_DISTRIBUTION)
    return chosen


def _row(params: SamplingParams, uniform: float) -> _Row:
    temperature = max(params.temperature, LEAST_TEMPERATURE) if params.temperature > 0 else 0.0
    return _Row(uniform, temperature, params.min_p, params.top_p, params.top_k)


@lru_cache(maxsize=1)
def _function(kernels: Kernels) -> Any:
    rows = (c_void_p, c_int64, c_int64, POINTER(_Row), c_int64)
    return kernels.function("draw_tokens", *rows, POINTER(c_int64), c_int)
