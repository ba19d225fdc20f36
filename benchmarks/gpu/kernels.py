"""Our attention kernels by themselves, beside the reference and, where it is, FlashInfer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from baton.kv_layout import KvLayout
from benchmarks.gpu.report import Kernel
from benchmarks.gpu.timing import device_ms
from engine.attention.flashinfer_paged import FlashInferPagedAttention
from engine.attention.interface import Attention
from engine.attention.reference import ReferenceAttention
from engine.attention.triton_paged import TritonPagedAttention
from engine.batch import Batch, build_batch
from engine.sampling.params import SamplingParams
from engine.sequence import Scheduled, Sequence

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_SMALL = [(300, 1), (31, 1), (0, 40), (77, 130)]
"""(context before, new tokens) of each sequence: the reference computes token by token."""
_DECODES = [(4096, 1)] * 32
_CHUNK = [(0, 8192)]


class _Case:
    def __init__(self, spans: SequenceOf[tuple[int, int]], device: str) -> None:
        counts = [-(-(before + new) // 16) for before, new in spans]
        self.layout = KvLayout(sum(counts), _KV_HEADS, 1, 16, _HEAD_DIM, "bfloat16")
        free = torch.randperm(sum(counts)).tolist()
        scheduled = []
        for (before, new), count in zip(spans, counts, strict=True):
            length = before + new
            seq = Sequence(None, [0] * length, length, SamplingParams(seed=0), b"")
            seq.num_computed_tokens = before
            seq.block_table = [free.pop() for _ in range(count)]
            scheduled.append(Scheduled(seq, new))
        self.batch: Batch = build_batch(scheduled, self.layout)
        self.kv = torch.randn(self.layout.shape, device=device).bfloat16()
        num_tokens = sum(new for _, new in spans)
        self.query = torch.randn(num_tokens, _HEADS, _HEAD_DIM, device=device).bfloat16()
        shape = (num_tokens, 2, _KV_HEADS, _HEAD_DIM)
        self.key_value = torch.randn(shape, device=device).bfloat16()

    def triton(self) -> TritonPagedAttention:
        return TritonPagedAttention(self.layout, self.kv, _HEADS)

    def of(self, attention: Attention) -> Callable[[], Tensor]:
        step = attention.begin(self.batch)
        return lambda: step(0, self.query, self.key_value)


def relative_error(device: str = "cuda") -> float:
    """Of a step of decodes and chunks, in bfloat16, against the reference in float64."""
    case = _Case(_SMALL, device)
    out = case.of(case.triton())().cpu().double()
    reference = ReferenceAttention(case.layout, case.kv.cpu()).begin(case.batch)
    exact = reference(0, case.query.cpu().double(), case.key_value.cpu())
    return float((out - exact).norm() / exact.norm())


def measured_kernels() -> list[Kernel]:
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    kernels = [Kernel("error of a mixed step", error=relative_error())]
    decodes = _Case(_DECODES, "cuda")
    took = device_ms(decodes.of(decodes.triton()))
    read = sum(before + new for before, new in _DECODES) * decodes.layout.token_bytes
    kernels.append(
        Kernel("32 decodes at 4,096", triton_ms=took, read_gb_s=round(read / took / 1e6, 1))
    )
    chunk = _Case(_CHUNK, "cuda")
    took = device_ms(chunk.of(chunk.triton()))
    other = None
    if has_flashinfer:
        other = device_ms(chunk.of(FlashInferPagedAttention(chunk.triton())))
    kernels.append(Kernel("a prompt of 8,192", triton_ms=took, flashinfer_ms=other))
    return kernels
