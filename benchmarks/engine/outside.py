"""What a decode step costs besides the model: scheduling, block tables, sampling, token events.

    python -m benchmarks.engine.outside --rows 32

prints JSON, for each way to draw tokens. A decode worker is made in this process as its ``main``
makes it, without gateways: its streams go on with passages of ``prose.txt``, which it prefills.
What its event loop does with the tokens, beside the next step, does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from baton.block_hash import HashDomain
from baton.config import BatonConfig, EngineConfig, KvTransferConfig
from baton.faults import Faults
from baton.telemetry import WorkerMetrics
from baton.worker.inbox import Inbox
from baton.worker.outbox import Outbox
from baton.worker.session_server import StepEvents, StreamKey
from benchmarks.engine.results import Outside
from decode_workers.scheduler import DecodeScheduler, DecodeStream
from decode_workers.worker import DecodeWorker
from engine import engine as engine_module
from engine.engine import Engine
from engine.intake import StopRule
from engine.sampling.params import SamplingParams
from engine.sampling.sampler import sample
from engine.sequence import Sequence
from engine.setup import plan_engine

P = ParamSpec("P")
R = TypeVar("R")

_TEXT = Path(__file__).with_name("prose.txt")
_CONTEXT = 128
_WARM_UP_STEPS = 5
_SAMPLINGS = {
    "greedily": SamplingParams(seed=0, temperature=0.0),
    "at temperature 1": SamplingParams(seed=0, temperature=1.0),
    "at temperature 1 with top_p 0.9": SamplingParams(seed=0, temperature=1.0, top_p=0.9),
    "at temperature 1 with top_k 50": SamplingParams(seed=0, temperature=1.0, top_k=50),
}


class _Clock:
    """Adds up what calls take."""

    def __init__(self) -> None:
        self.s = 0.0

    def timed(self, call: Callable[P, R]) -> Callable[P, R]:
        @wraps(call)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.s += time.perf_counter() - began

        return timed


class _Worker:
    """A decode worker with an engine of the default model."""

    def __init__(self) -> None:
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
            lender=None,  # type: ignore[arg-type]
            inbox=inbox,
            outbox=outbox,
            metrics=metrics,
            faults=Faults(None, "decode-0"),
            config=settings,
            transfer_config=KvTransferConfig(),
        )
        self.model, self.draw = _Clock(), _Clock()
        model = self._engine._model
        model.forward = self.model.timed(model.forward)  # type: ignore[method-assign]
        vars(engine_module)["sample"] = self.draw.timed(sample)
        tokenizer = Tokenizer.from_file(str(plan.checkpoint.folder / "tokenizer.json"))
        self._text = tokenizer.encode(_TEXT.read_text(), add_special_tokens=False).ids
        self._domain = plan.domain
        self._num_opened = 0

    def open(self, sampling: SamplingParams) -> None:
        """A stream after another passage than all before."""
        self._num_opened += 1
        first = 37 * self._num_opened % (len(self._text) - _CONTEXT)
        prompt = self._text[first : first + _CONTEXT]
        self._worker.open(_stream(self._num_opened, prompt, sampling, self._domain))

    def close_all(self) -> None:
        """Those that are open; later counts of tokens begin anew."""
        for key in list(self._worker._streams):
            self._worker.cancel(key)
        self.step()
        self.num_told = 0

    def _deliver(self, events: StepEvents) -> None:
        self.num_told += len(events.tokens)

    def step(self) -> float:
        """Seconds that it took. What it has left for the event loop runs afterwards."""
        self.model.s = self.draw.s = 0.0
        began = time.perf_counter()
        self._worker.step()
        taken = time.perf_counter() - began
        self._loop.call_soon(self._loop.stop)
        self._loop.run_forever()
        return taken


def _stream(
    number: int, prompt: list[int], sampling: SamplingParams, domain: HashDomain
) -> DecodeStream:
    key = StreamKey(1, number)
    return DecodeStream(
        key=key,
        request_id=f"request-{number}",
        sequence=Sequence(
            key=key,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=replace(sampling, seed=number),
            root_hash=domain.root(),
        ),
        stop=StopRule(10_000, frozenset()),
        deadline=float("inf"),
        transfer=None,
        handoff=None,
        queued_at=0.0,
        num_input_tokens=len(prompt),
    )


def measure(worker: _Worker, rows: int, sampling: str, *, steps: int) -> Outside:
    for _ in range(rows):
        worker.open(_SAMPLINGS[sampling])
    while worker.num_told < rows * _WARM_UP_STEPS:  # all prompts are computed by then
        worker.step()
    taken = [(worker.step(), worker.model.s, worker.draw.s) for _ in range(steps)]
    worker.close_all()
    return Outside(
        sampling=sampling,
        rows=rows,
        step_ms=_median_ms([step for step, _, _ in taken]),
        model_ms=_median_ms([model for _, model, _ in taken]),
        draw_ms=_median_ms([draw for _, _, draw in taken]),
        outside_ms=_median_ms([step - model for step, model, _ in taken]),
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
    worker = _Worker()
    found = [measure(worker, given.rows, each, steps=given.steps) for each in _SAMPLINGS]
    print(json.dumps([asdict(each) for each in found]))


if __name__ == "__main__":
    main()
