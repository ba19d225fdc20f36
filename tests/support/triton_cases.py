"""Cases of attention for Triton's kernels, on a GPU or in Triton's interpreter on the CPU.

Which of the two is decided when triton is first imported: ``interpreted_or_skip`` does that.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from baton.kv_layout import KvDtype, KvLayout
from engine.attention.reference import ReferenceAttention
from engine.batch import Batch, build_batch
from engine.sampling.params import SamplingParams
from engine.sequence import Scheduled, Sequence

LAYER = 1


def interpreted_or_skip(module: str) -> ModuleType:
    """One of our modules that need triton, for its interpreter; skips whoever asks where it cannot
    run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton (pip install triton)", allow_module_level=True)
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: tests/gpu shows it", allow_module_level=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")
        importlib.import_module("triton.experimental.gluon")  # else it comes with a launch
        _mend(importlib.import_module("triton.runtime.interpreter"))
        return importlib.import_module(module)


def _mend(interpreter: Any) -> None:
    """Makes the interpreter of triton 3.5 and 3.6 do what the compiler does, in two places.

    Loop bounds are made by int() of arrays of one element, which numpy allows for arrays without
    dimensions only, from 2.4 on. A product takes the bits of bfloat16 for whole numbers.
    """
    if getattr(interpreter, "is_mended", False):
        return
    interpreter.is_mended = True
    patch_tensor = interpreter._patch_lang_tensor
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    create_dot = builder.create_dot

    def patched(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.data.dtype != np.uint16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return handle(bits.view(np.float32), interpreter.tl.float32)

    def dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *others)

    interpreter._patch_lang_tensor = patched
    builder.create_dot = dot


@dataclass
class Case:
    """A step of (context before, new tokens) spans over scattered blocks, on the host."""

    layout: KvLayout
    kv: torch.Tensor
    batch: Batch
    query: torch.Tensor
    key_value: torch.Tensor
    num_heads: int
    windows: tuple[int | None, ...]

    def expected(self) -> torch.Tensor:
        """The reference's output; ``kv`` is written as it has to be."""
        reference = ReferenceAttention(self.layout, self.kv, self.windows)
        return reference.begin(self.batch)(LAYER, self.query, self.key_value)


def make_case(
    spans: SequenceOf[tuple[int, int]],
    *,
    seed: int = 0,
    block_size: int = 4,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 8,
    dtype: KvDtype = "float32",
    window: int | None = None,
) -> Case:
    random = torch.Generator().manual_seed(seed)
    counts = [-(-(before + new) // block_size) for before, new in spans]
    layout = KvLayout(sum(counts) + 3, num_kv_heads, 3, block_size, head_dim, dtype)
    free = torch.randperm(layout.num_blocks, generator=random).tolist()
    scheduled = []
    for (before, new), count in zip(spans, counts, strict=True):
        length = before + new
        num_prompt = before if new == 1 else length  # one token is a decode, behind its prompt
        seq = Sequence(None, [0] * length, num_prompt, SamplingParams(seed=0), b"")
        seq.num_computed_tokens = before
        seq.block_table = [free.pop() for _ in range(count)]
        scheduled.append(Scheduled(seq, new))
    torch_dtype = getattr(torch, dtype)
    num_heads, num_tokens = num_kv_heads * group, sum(new for _, new in spans)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(torch_dtype)

    # As in a model: views of one product's rows.
    rows = normal(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    return Case(
        layout=layout,
        kv=normal(*layout.shape),
        batch=build_batch(scheduled, layout),
        query=rows[:, :num_heads],
        key_value=rows[:, num_heads:].view(num_tokens, 2, num_kv_heads, head_dim),
        num_heads=num_heads,
        windows=() if window is None else (None, window, None),
    )
