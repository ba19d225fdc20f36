"""What bench-gpu counts and tells; what it measures needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.triton_cases import interpreted_or_skip

from benchmarks.gpu import bench, report, shapes
from benchmarks.measured import Measured
from engine.weights.tensor_shapes import expected_shapes

ROOT = Path(__file__).parents[3]
MEASURED = Measured("today", "make bench-gpu", "abc", "EPYC", 16, 1, "3.12.1", 0.1)


def results(fraction: float) -> report.Results:
    return report.Results(
        measured=MEASURED,
        device="NVIDIA H100",
        torch="2.11",
        triton="3.6",
        attention="Triton",
        copied_gb_s=2900.0,
        multiplied_tflop_s=700.0,
        decodes=(report.Decode("1B", 32, 1024, 1.25, 3_500_000_000, fraction),),
        prefills=(report.Prefill("8B", 8192, 260.0, fraction),),
        kernels=(report.Kernel("error of a mixed step", error=0.002),),
        handoffs=(report.Handoff("an 8B", 1024, 16, 1.6, 2_147_483_648, fraction),),
    )


@pytest.mark.parametrize("name", ["1B", "8B"])
def test_the_weights_that_a_step_moves_are_the_models_matrices(name: str) -> None:
    config = shapes.checkpoint(name).config
    matrices = {
        tensor: shape[0] * shape[1]
        for tensor, shape in expected_shapes(config).items()
        if len(shape) == 2
    }
    embedding = matrices.pop("model.embed_tokens.weight")
    head = matrices.pop("lm_head.weight", embedding)
    assert shapes.layer_weights(config) == sum(matrices.values())
    assert shapes.head_weights(config) == head
    num_parameters = {"1B": 1.24e9, "8B": 8.03e9}[name]  # as the models' names have it
    total = sum(matrices.values()) + head + (0 if config.tie_word_embeddings else embedding)
    assert total == pytest.approx(num_parameters, rel=0.01)


def test_a_decode_step_moves_every_weight_once_and_each_context() -> None:
    config = shapes.checkpoint("8B").config
    token = 32 * 2 * 8 * 128 * 2  # layers, K and V, KV heads, head_dim, bytes
    weights = 2 * (shapes.layer_weights(config) + shapes.head_weights(config))
    assert shapes.decode_bytes(config, 3, 1000) == weights + 3 * 1000 * token


def test_a_prompt_multiplies_every_weight_and_half_a_square_of_scores() -> None:
    config = shapes.checkpoint("1B").config
    products = 2 * (5 * shapes.layer_weights(config) + shapes.head_weights(config))
    seen = 1 + 2 + 3 + 4 + 5
    assert shapes.prefill_operations(config, 5) == products + 4 * 16 * 2048 * seen


def test_the_page_says_what_missed_its_goal(tmp_path: Path) -> None:
    results(0.65).write(tmp_path / "gpu.json")
    text = bench.section(tmp_path / "gpu.json")
    assert "| 1B | 32 | 1,024 | 1.25 | 3.5 | 0.65, missed |" in text
    assert "| 8B | 8,192 | 260.0 | 0.65 |" in text
    assert "one NVIDIA H100" in text
    assert "| an 8B | 1,024 | 16 | 1.60 | 1,342 | 0.65 |" in text
    assert "| error of a mixed step | 2.0e-03 |  | not measured |  |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.bench", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == bench.NO_GPU
    assert done.stderr == "bench-gpu: torch finds no GPU; nothing is measured\n"
    assert not out.exists()


def test_it_needs_neither_ray_nor_redis_nor_fastapi_nor_pydantic() -> None:
    loaded = "import benchmarks.gpu.bench, engine.engine, engine.gpu.plan, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"ray", "redis", "fastapi", "pydantic"}.isdisjoint(done.stdout.split())


def test_steps_and_prompts_are_those_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in Triton's interpreter: what is timed runs, and leaves no blocks behind."""
    interpreted_or_skip("engine.attention.triton_paged")
    from benchmarks.gpu.stepped import GpuEngine

    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    tiny |= {"vocab_size": 99, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.SHAPES["1B"] | tiny)
    engine = GpuEngine(
        "tiny", num_tokens=128, max_num_seqs=2, max_model_len=64, device=torch.device("cpu")
    )
    assert engine.decode_ms(2, 20, steps=2) > 0
    assert engine.prefill_ms(40, repeats=1) > 0
    counts = engine._engine.kv.pool.counts()
    assert counts.referenced == 0
    assert counts.free + counts.cached == 8


def test_the_error_that_it_tells_is_that_of_rounding() -> None:
    interpreted_or_skip("engine.attention.triton_paged")
    from benchmarks.gpu.kernels import relative_error

    assert 1e-4 < relative_error("cpu") < 8e-3
