"""What a decode step costs besides the model: scheduling, block tables, sampling, token events.

    python -m benchmarks.engine.outside --rows 32

prints JSON. A decode worker is made in this process as its ``main`` makes it, without gateways:
its streams prefill here and are sampled with a temperature and top_p. What its event loop does
with the tokens, beside the next step, does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from baton.block_hash import HashDomain
from baton.config import BatonConfig, EngineConfig, KvTransferConfig
from baton.faults import Faults
from baton.telemetry import WorkerMetrics
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.session_server import StepEvents, StreamKey
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from decode_workers.worker import DecodeWorker
from engine.engine import Engine
from engine.intake import StopRule
from engine.sampling.params import SamplingParams
from engine.sequence import Sequence
from engine.setup import plan_engine

_CONTEXT = 128
_VOCABULARY = range(1000, 40_000)
_WARM_UP_STEPS = 5


@dataclass(frozen=True, slots=True)
class Outside:
    """Medians over the steps, in ms."""

    rows: int
    step_ms: float
    """Of the whole step, as the worker takes it."""
    model_ms: float
    """Of the forward pass in it, from token ids to logits."""
    outside_ms: float


class _Worker:
    """A decode worker with an engine of the default model."""

    def __init__(self, rows: int) -> None:
        settings = EngineConfig(kv_cache_bytes=256 * 1024 * 1024)
        plan = plan_engine(BatonConfig(engine=settings), secret="benchmark")
        self._engine = Engine(
            plan.checkpoint,
            dtype=plan.dtype,
            layout=plan.layout,
            memory=torch.zeros(plan.layout.shape, dtype=plan.dtype),
            domain=plan.domain,
            threads=plan.threads,
            cpu_kernels=settings.cpu_kernels,
        )
        self._engine.kv.pool.watch()
        self._loop = asyncio.new_event_loop()
        inbox = Inbox(self._loop)
        metrics = WorkerMetrics(CollectorRegistry(), worker_id="decode-0", role="decode")
        outbox = Outbox(inbox, metrics)
        outbox.deliver = self._deliver
        self.num_told = 0
        self._worker = DecodeWorker(
            engine=self._engine,
            scheduler=DecodeScheduler(
                self._engine.kv,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_num_seqs=settings.max_num_seqs,
                watermark_blocks=max(1, plan.layout.num_blocks // 100),
            ),
            receiver=None,  # type: ignore[arg-type]  # nothing is handed over
            inbox=inbox,
            outbox=outbox,
            metrics=metrics,
            faults=Faults(None, "decode-0"),
            config=settings,
            transfer_config=KvTransferConfig(),
        )
        self.model_s = 0.0
        self._time_model()
        rng = random.Random(0)
        for number in range(rows):
            self._worker.open(_stream(number, rng.choices(_VOCABULARY, k=_CONTEXT), plan.domain))

    def _time_model(self) -> None:
        forward = self._engine._model.forward

        def timed(*args: Any) -> torch.Tensor:
            began = time.perf_counter()
            logits = forward(*args)
            self.model_s += time.perf_counter() - began
            return logits

        self._engine._model.forward = timed  # type: ignore[method-assign]

    def _deliver(self, events: StepEvents) -> None:
        self.num_told += len(events.tokens)

    def step(self) -> None:
        self._worker.step()

    def drain_loop(self) -> None:
        """Runs what the step has left for the event loop, which the engine does not wait for."""
        self._loop.call_soon(self._loop.stop)
        self._loop.run_forever()


def _stream(number: int, prompt: list[int], domain: HashDomain) -> DecodeStream:
    key = StreamKey(1, number)
    return DecodeStream(
        key=key,
        request_id=f"request-{number}",
        sequence=Sequence(
            key=key,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(seed=number, temperature=1.0, top_p=0.9),
            root_hash=domain.root(),
        ),
        stop=StopRule(10_000, frozenset()),
        deadline=float("inf"),
        transfer=None,
        handoff=None,
        queued_at=0.0,
        num_input_tokens=len(prompt),
    )


def measure(rows: int, *, steps: int) -> Outside:
    worker = _Worker(rows)
    while worker.num_told < rows * _WARM_UP_STEPS:  # all prompts are computed by then
        worker.step()
        worker.drain_loop()
    taken: list[tuple[float, float]] = []
    for _ in range(steps):
        worker.model_s = 0.0
        began = time.perf_counter()
        worker.step()
        taken.append((time.perf_counter() - began, worker.model_s))
        worker.drain_loop()
    return Outside(
        rows=rows,
        step_ms=_median_ms([step for step, _ in taken]),
        model_ms=_median_ms([model for _, model in taken]),
        outside_ms=_median_ms([step - model for step, model in taken]),
    )


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine.outside", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rows", type=int, default=32, help="streams")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    print(json.dumps(asdict(measure(given.rows, steps=given.steps))))


if __name__ == "__main__":
    main()
