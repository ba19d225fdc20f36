"""How near does the engine come to what a GPU can do? Decode steps beside copying their bytes,
prompts beside multiplying matrices, attention beside its reference and FlashInfer, hand-offs
between two processes beside a copy.

    python -m benchmarks.gpu.bench
    python -m benchmarks.gpu.bench --report     # results into docs/, runs nothing

One process, no server: it needs torch with CUDA, triton, numpy, tokenizers, safetensors and
grpcio, but neither Ray nor Redis nor FastAPI. Without a GPU it ends with exit status 77.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import shlex
import sys
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from baton.errors import BatonError, ConfigurationError, TransferError
from benchmarks import page
from benchmarks.gpu import report
from benchmarks.gpu.shapes import SHAPES, decode_bytes, prefill_operations
from benchmarks.measured import measured_now
from kv_transfer.transports.base import LinkError

SECTION = "gpu"
KEPT = page.KEPT / "gpu.json"
_RESULTS = page.RESULTS / "gpu.json"
NO_GPU = 77
"""Exit status, of tests that are skipped in many a build system."""
BATCHES = (1, 32, 256)
CONTEXT = 1024
PROMPTS = (2048, 8192)
_ROOM = 64
"""Tokens of each sequence beyond CONTEXT, for the steps that are timed."""


def missing() -> str | None:
    """What this machine lacks, as a clause; None where it can be measured."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    return None


def section(kept: Path = KEPT) -> str:
    """Of docs/performance.md. Raises OSError or ValueError."""
    return report.section(kept)


def run(models: SequenceOf[str], *, steps: int, repeats: int, command: str) -> report.Results:
    """Measures everything, on the GPU that torch is set to."""
    import triton

    from benchmarks.gpu import handoff, kernels, timing

    measured = measured_now(command)
    copied, multiplied = timing.copied_bytes_per_s(), timing.multiplied_per_s()
    found = tuple(kernels.measured_kernels())
    torch.cuda.empty_cache()
    left_out: list[str] = []
    rows: list[report.Decode | report.Prefill] = []
    for name in models:
        try:
            for row in _rows(name, copied, multiplied, steps, repeats):
                rows.append(row)
        except (torch.OutOfMemoryError, ConfigurationError) as error:
            left_out.append(f"{name} ({str(error).splitlines()[0]})")
        gc.collect()
        torch.cuda.empty_cache()
    moved: tuple[report.Handoff, ...] = ()
    try:
        moved = tuple(handoff.handoffs(copied))
    except (LinkError, TransferError, torch.OutOfMemoryError) as error:
        left_out.append(f"the hand-off ({str(error).splitlines()[0]})")
    if not rows:
        raise ConfigurationError(f"nothing could be measured: {'; '.join(left_out)}")
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    return report.Results(
        measured=measured,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        attention="FlashInfer" if has_flashinfer else "Triton",
        copied_gb_s=round(copied / 1e9, 1),
        multiplied_tflop_s=round(multiplied / 1e12, 1),
        decodes=tuple(row for row in rows if isinstance(row, report.Decode)),
        prefills=tuple(row for row in rows if isinstance(row, report.Prefill)),
        kernels=found,
        handoffs=moved,
        left_out=tuple(left_out),
    )


def _rows(
    name: str, copied: float, multiplied: float, steps: int, repeats: int
) -> Iterator[report.Decode | report.Prefill]:
    """Of one model; ``copied`` and ``multiplied`` are the GPU's rates, a second."""
    from benchmarks.gpu.stepped import GpuEngine

    length = CONTEXT + _ROOM
    engine = GpuEngine(
        name,
        num_tokens=max(max(BATCHES) * length, max(PROMPTS)),
        max_num_seqs=max(BATCHES),
        max_model_len=max(PROMPTS) + _ROOM,
    )
    for batch in BATCHES:
        took = engine.decode_ms(batch, CONTEXT, steps=steps)
        num_bytes = decode_bytes(engine.config, batch, CONTEXT)
        fraction = num_bytes / copied / (took / 1000)
        yield report.Decode(name, batch, CONTEXT, round(took, 3), num_bytes, round(fraction, 3))
    for num_tokens in PROMPTS:
        took = engine.prefill_ms(num_tokens, repeats=repeats)
        rate = prefill_operations(engine.config, num_tokens) / (took / 1000)
        yield report.Prefill(name, num_tokens, round(took, 2), round(rate / multiplied, 3))


def main() -> None:
    module = "benchmarks.gpu.bench"
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=40, help="timed of each batch, at most 60")
    parser.add_argument("--repeats", type=int, default=5, help="timed of each prompt")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FILE")
    parser.add_argument(
        "--report", action="store_true", help="write docs/performance.md from those results"
    )
    given = parser.parse_args()
    lacks = missing()
    if not given.report and lacks is not None:
        print(f"bench-gpu: {lacks}; nothing is measured", file=sys.stderr)
        sys.exit(NO_GPU)
    if given.report:
        page.publish(
            report.Results, given.out, module=module, kept=KEPT, name=SECTION, section=section
        )
        return
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    results = run(given.models, steps=given.steps, repeats=given.repeats, command=command)
    results.write(given.out)
    print(f"{report.report(report.Results.read(given.out))}\n\nwritten: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except BatonError as error:
        sys.exit(error.message)
    except (OSError, ValueError) as error:
        sys.exit(f"bench-gpu: {error}")
