"""GGUF files of every architecture that llama.cpp stores: the tensors, logits and scalings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.architecture_check import assert_equals_oracle, engine_for
from support.tiny_architecture_gguf import gguf_of
from support.tiny_architectures import ORIGINAL, VARIANTS, Variant, save_variant

from baton.checkpoint.checkpoint import open_checkpoint
from baton.errors import CheckpointError
from engine.weights.load import hf_folder, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

STORED = ["llama", "llama with biases", "qwen2", "qwen3", "qwen3 with biases", "mixtral"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path: Path) -> Mapping[str, torch.Tensor]:
    return load_weights(open_checkpoint(str(path)), torch.float32)


@pytest.mark.parametrize("name", [*STORED, "qwen3 moe"])
def test_a_gguf_computes_what_its_folder_computes(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    model = save_variant(folder, VARIANTS[name])
    path = gguf_of(tmp_path / "m.gguf", folder)
    expected, found = load(folder), load(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert_equals_oracle(engine_for(path), model)


def llama3_factors(head_dim: int) -> np.ndarray[Any, Any]:
    """``rope_freqs.weight`` of the llama3 variant, as llama.cpp's conversion computes it."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * 1e4 ** (i / head_dim)
        smooth = (ORIGINAL / wave - 1.0) / (4.0 - 1.0)
        if wave < ORIGINAL / 4.0:
            factors.append(1.0)
        elif wave > ORIGINAL / 1.0:
            factors.append(8.0)
        else:
            factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    return np.array(factors, dtype=np.float32)


YARN_FIELDS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": ORIGINAL,
}


@pytest.mark.parametrize(
    ("name", "fields", "tensors"),
    [
        (
            "llama, rope linear",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {},
        ),
        ("llama, rope linear", {"rope.scale_linear": 8.0}, {}),
        ("llama, rope yarn", YARN_FIELDS, {}),
        ("llama, rope llama3", {}, {"rope_freqs.weight": llama3_factors(16)}),
    ],
)
def test_a_scaled_rope_of_a_gguf_computes_what_transformers_does(
    tmp_path: Path, name: str, fields: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    model = save_variant(tmp_path / "m", VARIANTS[name])
    path = gguf_of(tmp_path / "m.gguf", tmp_path / "m", fields=fields, extra_tensors=tensors)
    assert_equals_oracle(engine_for(path), model)


def test_transformers_reads_what_is_made_of_scaled_frequencies(tmp_path: Path) -> None:
    from transformers import AutoConfig

    save_variant(tmp_path / "m", VARIANTS["llama, rope llama3"])
    factors = llama3_factors(16)
    tensors = {"rope_freqs.weight": factors}
    path = gguf_of(tmp_path / "m.gguf", tmp_path / "m", extra_tensors=tensors)
    folder = hf_folder(open_checkpoint(str(path)), torch.float32)
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    assert rope["short_factor"] == rope["long_factor"] == factors.tolist()


@pytest.mark.parametrize(
    ("kind", "bound"), [("F16", 1e-3), ("BF16", 5e-3), ("Q8_0", 0.01), ("Q4_1", 0.1), ("Q4_0", 0.1)]
)
@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_a_quantized_gguf_is_dequantized(
    tmp_path: Path, name: str, kind: str, bound: float
) -> None:
    save_variant(tmp_path / "m", VARIANTS[name])
    path = gguf_of(tmp_path / "m.gguf", tmp_path / "m", kind=gguf.GGMLQuantizationType[kind])
    found = load(path)
    for key, expected in load(tmp_path / "m").items():
        assert (found[key] - expected).norm() / expected.norm() < bound, key


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are as long as one block of any quantization."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("wide")
    save_variant(folder, Variant("Llama", sizes))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"),
        *("IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4"),
    ],
)
def test_any_bytes_are_dequantized_as_the_gguf_package_does(
    tmp_path: Path, wide_folder: Path, kind: str
) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    random = np.random.default_rng(0)
    raw = {
        f"blk.0.{name}.weight": random.integers(
            0, 256, gguf.quants.quant_shape_to_byte_shape((rows, 256), quantization), np.uint8
        )
        for name, rows in (("attn_q", 256), ("attn_v", 128), ("ffn_down", 256))
    }
    path = gguf_of(tmp_path / "m.gguf", wide_folder, kind=quantization, raw=raw)
    with np.errstate(all="ignore"):  # some scales are infinite or no numbers
        found = load(path)
        values = {name: gguf.quants.dequantize(data, quantization) for name, data in raw.items()}
    # Pairs of rows of four heads, back from neighbours to halves.
    query = values["blk.0.attn_q.weight"].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    prefix = "model.layers.0"
    np.testing.assert_array_equal(found[f"{prefix}.self_attn.q_proj.weight"], query)
    for theirs, ours in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
        expected = values[f"blk.0.{theirs}.weight"]
        np.testing.assert_array_equal(found[f"{prefix}.{ours}.weight"], expected)


@pytest.mark.parametrize(
    ("name", "fields", "tensors", "named"),
    [
        ("qwen2", {"expert_count": 4}, {}, r"qwen2\.expert_count = 4 is not supported"),
        ("qwen3 moe", {"expert_count": 0}, {}, r"qwen3moe\.expert_count = 0 is not supported"),
        ("mixtral", {"expert_used_count": 9}, {}, "num_experts_per_tok 9"),
        ("mixtral", {"expert_count": 3}, {}, r"surplus .*experts\.3\.w"),
        ("mixtral", {"expert_count": 5}, {}, r"missing .*experts\.4\.w1"),
        ("qwen3", {"attention.sliding_window": 8}, {}, r"qwen3\.attention\.sliding_window = 8"),
        ("llama", {}, {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), "f4")}, "surplus blk"),
        ("llama", {}, {"rope_freqs.weight": np.ones(3, "f4")}, "short_factor has to be 8 numbers"),
        ("llama", YARN_FIELDS, {"rope_freqs.weight": np.ones(8, "f4")}, "with rope_freqs"),
        ("qwen3", {}, {"blk.1.attn_sinks.weight": np.ones(4, "f4")}, r"surplus blk\.1\.attn_sinks"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    named: str,
) -> None:
    save_variant(tmp_path / "m", VARIANTS[name])
    path = gguf_of(tmp_path / "m.gguf", tmp_path / "m", fields=fields, extra_tensors=tensors)
    with pytest.raises(CheckpointError, match=named):
        engine_for(path)


def test_a_truncated_stack_of_experts_is_named(tmp_path: Path) -> None:
    save_variant(tmp_path / "m", VARIANTS["mixtral"])
    path = gguf_of(tmp_path / "m.gguf", tmp_path / "m")
    open_checkpoint(str(path))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"m\.gguf.*truncated"):
        engine_for(path)
