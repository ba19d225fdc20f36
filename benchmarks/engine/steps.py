"""Steps of one engine in this process: nothing but the model, its cache and its sampling.

    python -m benchmarks.engine.steps --rows 1 8 32 --context 256

prints JSON. Contexts are filled with random KV, as if another worker had sent it; the decode
steps that are timed then append to them, greedily. The prompt is computed in chunks of the
engine's size.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from baton.config import BatonConfig, EngineConfig
from engine.chunked_prefill import even_share
from engine.engine import Engine, Scheduled
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from engine.setup import EnginePlan, plan_engine

_VOCABULARY = range(1000, 40_000)
_WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True)
class StepTime:
    rows: int
    context: int
    """Tokens each row attends to when timing begins."""
    step_ms: float
    """Median."""


class SteppedEngine:
    """An engine of the default model whose sequences are made here."""

    def __init__(self, engine: EngineConfig) -> None:
        self._plan: EnginePlan = plan_engine(BatonConfig(engine=engine), secret="benchmark")
        self._chunk = engine.max_num_batched_tokens
        layout = self._plan.layout
        self._memory = torch.zeros(layout.shape, dtype=self._plan.dtype)
        self._engine = Engine(
            self._plan.checkpoint,
            dtype=self._plan.dtype,
            layout=layout,
            memory=self._memory,
            domain=self._plan.domain,
            threads=self._plan.threads,
            cpu_kernels=engine.cpu_kernels,
            quantization=engine.quantization,
        )
        self._random_kv = torch.randn(layout.shape[1:]).to(self._plan.dtype)
        self._rng = random.Random(0)
        self._made = 0

    def decode_ms(self, rows: int, context: int, *, steps: int) -> float:
        """The median of so many decode steps of ``rows`` sequences."""
        return statistics.median(self.decode_times_ms(rows, context, steps=steps))

    def decode_times_ms(self, rows: int, context: int, *, steps: int) -> list[float]:
        """Of so many decode steps of ``rows`` sequences."""
        sequences = [self._received(context) for _ in range(rows)]
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
        gc.collect()
        return times

    def prompt_ms(self, num_tokens: int, *, repeats: int) -> float:
        times: list[float] = []
        for _ in range(1 + repeats):
            sequence = self._sequence(num_tokens)
            began = time.perf_counter()
            self._compute(sequence)
            times.append((time.perf_counter() - began) * 1000)
            self._engine.kv.free(sequence)
        return statistics.median(times[1:])

    def negative_log_likelihood(self, text: str, *, window: int) -> tuple[float, int]:
        """Nats a token, and of how many, of ``text`` cut into windows of so many tokens; the
        first token of a window has nothing before it and does not count."""
        tokenizer = Tokenizer.from_file(str(self._plan.checkpoint.folder / "tokenizer.json"))
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        total, counted = 0.0, 0
        for first in range(0, len(encoded) - window + 1, window):
            sequence = self._of(encoded[first : first + window])
            assert self._engine.kv.ensure_blocks(sequence, window)
            logits = [
                self._engine.score(Scheduled(sequence, min(self._chunk, window - done)))
                for done in range(0, window, self._chunk)
            ]
            following = torch.tensor(sequence.token_ids[1:])
            losses = torch.nn.functional.cross_entropy(torch.cat(logits)[:-1], following)
            total, counted = total + float(losses) * len(following), counted + len(following)
            self._engine.kv.free(sequence)
        return total / counted, counted

    @property
    def block_bytes(self) -> int:
        return self._plan.layout.block_bytes

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return self.block_bytes // self._plan.layout.block_size

    def _received(self, context: int) -> Sequence:
        """Its KV is random, and one token is to be computed."""
        sequence = self._sequence(context)
        assert self._engine.kv.ensure_blocks(sequence, context), "raise the KV cache's size"
        for block in sequence.block_table:
            self._memory[block].copy_(self._random_kv)
        self._engine.kv.adopt(sequence, context - 1)
        return sequence

    def _compute(self, sequence: Sequence) -> None:
        """Up to and with the first sampled token."""
        assert self._engine.kv.ensure_blocks(sequence, sequence.num_tokens)
        while sequence.num_emitted_tokens == 0:
            share = even_share(sequence.num_remaining, self._chunk, self._plan.layout.block_size)
            self._engine.step([Scheduled(sequence, share)])

    def _sequence(self, num_tokens: int) -> Sequence:
        return self._of(self._rng.choices(_VOCABULARY, k=num_tokens))

    def _of(self, token_ids: list[int]) -> Sequence:
        self._made += 1
        return Sequence(
            key=self._made,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(seed=0, temperature=0.0),
            root_hash=self._plan.domain.root(),
        )


def measure(
    engine: SteppedEngine, rows: SequenceOf[int], contexts: SequenceOf[int], *, steps: int
) -> list[StepTime]:
    return [
        StepTime(each, context, round(engine.decode_ms(each, context, steps=steps), 3))
        for context in contexts
        for each in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.steps", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[256])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompt", type=int, default=1030, help="tokens")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-kernels", choices=("auto", "native", "torch"), default="auto")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    given = parser.parse_args()
    engine = SteppedEngine(
        EngineConfig(
            threads=given.threads,
            cpu_kernels=given.cpu_kernels,
            quantization=given.quantization,
            kv_cache_bytes=given.kv_cache_bytes,
        )
    )
    found = measure(engine, given.rows, given.context, steps=given.steps)
    for each in found:
        print(json.dumps({"rows": each.rows, "context": each.context, "ms": each.step_ms}))
    print(json.dumps({"prompt": given.prompt, "ms": engine.prompt_ms(given.prompt, repeats=3)}))


if __name__ == "__main__":
    main()
