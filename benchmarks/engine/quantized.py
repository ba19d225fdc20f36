"""What do weights in fewer bits cost, and what do they bring? The perplexity of a fixed text, the
time of a step, and memory, of the default model in one process after another.

    python -m benchmarks.engine.quantized --rounds 3
    python -m benchmarks.engine.quantized --report     # results into docs/, runs nothing

The text is ``prose.txt``: technical English, cut into windows of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from baton.config import EngineConfig
from baton.errors import BatonError
from baton.worker.environment import worker_environment
from benchmarks import page
from benchmarks.engine.steps import SteppedEngine
from benchmarks.measured import Measured, measured_now

SECTION = "quantized"
KEPT = page.KEPT / "quantized.json"
_RESULTS = page.RESULTS / "quantized.json"
_TEXT = Path(__file__).with_name("prose.txt")
KINDS = ("none", "int8", "int4")
ROWS = (1, 8, 32)
_CONTEXT = 192
_PROMPT = 1030
_WINDOW = 1024
_STEPS = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One process."""

    quantization: str
    perplexity: float
    num_tokens: int
    """That were predicted."""
    step_ms: dict[str, float]
    """By rows."""
    prompt_ms: float
    memory_mb: float
    """Its own (not the pages of files that are mapped), once it is loaded, without its KV."""


@dataclass(frozen=True, slots=True)
class Results(page.KeptResults):
    measured: Measured
    samples: tuple[Sample, ...]

    def of(self, quantization: str) -> Sample:
        """The medians over rounds."""
        own = [sample for sample in self.samples if sample.quantization == quantization]
        return Sample(
            quantization=quantization,
            perplexity=own[0].perplexity,
            num_tokens=own[0].num_tokens,
            step_ms={n: statistics.median(s.step_ms[n] for s in own) for n in own[0].step_ms},
            prompt_ms=statistics.median(sample.prompt_ms for sample in own),
            memory_mb=statistics.median(sample.memory_mb for sample in own),
        )

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        samples = tuple(Sample(**each) for each in data["samples"])
        return cls(measured=Measured(**data["measured"]), samples=samples)


def measure(quantization: str) -> Sample:
    """In this process, which should do nothing else."""
    config = EngineConfig.model_validate(
        {"quantization": quantization, "cpu_kernels": "auto", "dtype": "bfloat16"}
    )
    engine = SteppedEngine(config)
    memory = psutil.Process().memory_info()
    text = _TEXT.read_text()
    loss, num_tokens = engine.negative_log_likelihood(text, window=_WINDOW)
    step_ms = {str(rows): round(engine.decode_ms(rows, _CONTEXT, steps=_STEPS), 3) for rows in ROWS}
    prompt_ms = round(engine.prompt_ms(_PROMPT, repeats=3), 3)
    return Sample(
        quantization=quantization,
        perplexity=round(math.exp(loss), 4),
        num_tokens=num_tokens,
        step_ms=step_ms,
        prompt_ms=prompt_ms,
        memory_mb=round((memory.rss - memory.shared - config.kv_cache_bytes) / 1e6, 1),
    )


def measured_apart(quantization: str) -> Sample:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine.quantized", "--one", quantization],
        check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **worker_environment(os.environ)},
    )  # fmt: skip
    return Sample(**json.loads(done.stdout))


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report(Results.read(kept))


def report(results: Results) -> str:
    whole = results.of("none")
    rows: list[Sequence[str]] = [
        ("weights", "perplexity", *(f"step at {n}, ms" for n in ROWS), "prompt, ms", "memory, MB")
    ]
    for kind in KINDS:
        own = results.of(kind)
        rows.append(
            (
                "bfloat16" if kind == "none" else kind,
                f"{own.perplexity:.2f} ({own.perplexity / whole.perplexity - 1:+.1%})",
                *(f"{own.step_ms[str(n)]:.1f}" for n in ROWS),
                f"{own.prompt_ms:.0f}",
                f"{own.memory_mb:,.0f}",
            )
        )
    setting = (
        f"{results.measured.sentence} One engine in a process of its own, without a server. The "
        f"perplexity is that of {whole.num_tokens} tokens of technical English; a step decodes at "
        f"contexts of {_CONTEXT} tokens; a prompt has {_PROMPT}. Memory is the process' own, "
        "without the pages of mapped files and its KV cache. Times are medians of "
        f"{len(results.samples) // len(KINDS)} rounds in which all take turns."
    )
    return f"{setting}\n\n{page.markdown_table(rows)}"


def main() -> None:
    module = "benchmarks.engine.quantized"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help="measure these weights, once, and print JSON")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE", help="of the samples")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those samples"
    )
    given = parser.parse_args()
    if given.one:
        print(json.dumps(asdict(measure(given.one))))
        return
    if given.report:
        page.publish(Results, given.out, module=module, kept=KEPT, name=SECTION, section=section)
        return
    measured = measured_now(shlex.join(["python", "-m", module, *sys.argv[1:]]))
    samples = [measured_apart(kind) for _ in range(given.rounds) for kind in KINDS]
    results = Results(measured, tuple(samples))
    results.write(given.out)
    print(f"{report(Results.read(given.out))}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"quantized: {error}")
