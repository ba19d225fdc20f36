"""One engine on the GPU, in this process, with random weights: its steps, timed on the host.

A step is what a worker's is: it packs its inputs, computes, draws, and reads the tokens back. But a
prompt is one step, whatever ``engine.max_num_batched_tokens`` is by default.
"""

from __future__ import annotations

import random
import time
from statistics import median

import torch

from baton.block_hash import HashDomain
from benchmarks.gpu.shapes import checkpoint, layout_of
from benchmarks.gpu.timing import host_ms
from engine.engine import Engine, Scheduled
from engine.gpu.device import GpuAttention
from engine.gpu.plan import GpuPlan
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence

_WARM_UP_STEPS = 5
_DOMAIN = HashDomain(key=b"k" * 32, weights_revision="random", kv_dtype="bfloat16")


class GpuEngine:
    """``name`` is one of SHAPES. There is KV for ``num_tokens`` tokens, and a graph of decodes
    for up to ``max_num_seqs`` sequences of at most ``max_model_len``. ``device`` is by default
    torch's GPU."""

    def __init__(
        self,
        name: str,
        *,
        num_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        attention: GpuAttention = "auto",
        device: torch.device | None = None,
    ) -> None:
        opened = checkpoint(name)
        self.config = opened.config
        layout = layout_of(self.config, num_tokens)
        device = device or torch.device("cuda", torch.cuda.current_device())
        gpu = GpuPlan(device, attention, max_num_seqs, max_model_len)
        self._engine = Engine(
            opened,
            dtype=torch.bfloat16,
            layout=layout,
            memory=gpu.memory(layout),
            domain=_DOMAIN,
            gpu=gpu,
        )
        for block in self._engine.kv.tensor:
            block.normal_()
        self._random = random.Random(0)

    def decode_ms(self, batch: int, context: int, *, steps: int) -> float:
        """The median step of ``batch`` sequences; ``context`` is what each attends to when half
        of the timed steps are over."""
        first = context - _WARM_UP_STEPS - steps // 2
        sequences = [self._received(first) for _ in range(batch)]
        times: list[float] = []
        for number in range(_WARM_UP_STEPS + steps):
            for sequence in sequences:
                assert self._engine.kv.ensure_blocks(sequence, sequence.num_tokens)
            began = time.perf_counter()
            self._engine.step([Scheduled(sequence, 1) for sequence in sequences])
            if number >= _WARM_UP_STEPS:
                times.append((time.perf_counter() - began) * 1000)
        for sequence in sequences:
            self._engine.kv.free(sequence)
        return median(times)

    def prefill_ms(self, num_tokens: int, *, repeats: int) -> float:
        """The median of a prompt that is computed in one step, its first token included."""

        def compute() -> None:
            sequence = self._sequence(num_tokens)
            assert self._engine.kv.ensure_blocks(sequence, num_tokens)
            self._engine.step([Scheduled(sequence, num_tokens)])
            self._engine.kv.free(sequence)

        return host_ms(compute, repeats=repeats, warm_ups=2)

    def _received(self, context: int) -> Sequence:
        """Its KV is there, as if another worker had sent it, but for its last token's."""
        sequence = self._sequence(context)
        assert self._engine.kv.ensure_blocks(sequence, context)
        self._engine.kv.adopt(sequence, context - 1)
        return sequence

    def _sequence(self, num_tokens: int) -> Sequence:
        token_ids = self._random.choices(range(self.config.vocab_size), k=num_tokens)
        greedy = SamplingParams(seed=0, temperature=0.0)
        return Sequence(None, token_ids, num_tokens, greedy, _DOMAIN.root())
