"""Loading weights of tiny models: every source gives the same tensors, or a named fault."""

from __future__ import annotations

import shutil
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import TinyLlama, tiny_tensors, write_tiny_gguf, write_tiny_llama

from baton.checkpoint.checkpoint import open_checkpoint
from baton.errors import CheckpointError
from engine.weights.load import hf_folder, load_weights

UNTIED: dict[str, Any] = {
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Mapping[str, torch.Tensor]:
    return load_weights(open_checkpoint(str(path)), dtype)


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# Hugging Face folders


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("sizes", [{}, UNTIED])
def test_a_folder_gives_its_tensors(tmp_path: Path, num_shards: int, sizes: dict[str, Any]) -> None:
    folder = write_tiny_llama(tmp_path / "m", num_shards=num_shards, **sizes)
    assert_equal(load(folder), tiny_tensors(TinyLlama(**sizes)))
    assert hf_folder(open_checkpoint(str(folder)), torch.float32) == folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_is_a_plain_cast(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    folder = write_tiny_llama(tmp_path / "m", dtype=stored)
    expected = {name: t.to(stored).to(dtype) for name, t in tiny_tensors(TinyLlama()).items()}
    assert_equal(load(folder, dtype), expected)


def test_a_cast_tensor_is_held_by_nobody_but_who_asked_for_it(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", dtype=torch.float16)
    tensors = load(folder)
    asked = tensors[KEYS]
    watched = weakref.ref(asked)
    asked.zero_()
    assert not torch.equal(tensors[KEYS], asked)
    del asked
    assert watched() is None


def test_tensors_are_mapped_and_writing_to_them_leaves_the_file(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    tensors = load(folder)
    maps = Path("/proc/self/maps").read_text()
    assert str(folder / "model.safetensors") in maps
    tensors["model.norm.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replaces tensors of a single-file folder; None removes one."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(kept, path)
    return folder


KEYS = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({KEYS: None}, rf"missing {KEYS} \[32, 64\]"),
        ({KEYS: torch.ones(16, 64)}, rf"misshapen {KEYS} is \[16, 64\], expected \[32, 64\]"),
        ({"model.extra": torch.ones(3)}, r"surplus model\.extra \[3\]"),
        ({KEYS: torch.ones(32, 64, dtype=torch.int8)}, f"{KEYS} is stored as I8"),
        ({HEAD: torch.ones(288, 64)}, rf"tie_word_embeddings, but {HEAD} differs"),
        ({HEAD: torch.ones(2, 64)}, rf"surplus {HEAD}"),
        ({KEYS: None, NORM: torch.ones(1)}, f"missing {KEYS}.*misshapen {NORM}"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    folder = rewrite(write_tiny_llama(tmp_path / "m"), **changes)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{named}"):
        load(folder)


def test_an_untied_model_must_have_its_head(tmp_path: Path) -> None:
    folder = rewrite(write_tiny_llama(tmp_path / "m", **UNTIED), **{HEAD: None})
    with pytest.raises(CheckpointError, match=rf"missing {HEAD}"):
        load(folder)


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    save_file({NORM: torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight.* and 14 more$"):
        load(folder)


def test_harmless_extras_are_left_out(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        HEAD: embedding.clone(),  # the tied embedding, stored twice
    }
    assert_equal(load(rewrite(folder, **extras)), tiny_tensors(TinyLlama()))


@pytest.mark.parametrize("num_bytes", [0, 7, 100, 5000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, num_bytes: int) -> None:
    folder = write_tiny_llama(tmp_path / "m", num_shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors.*truncated"):
        load(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", num_shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors: model\..*another"):
        load(folder)


# GGUF files


@pytest.mark.parametrize("sizes", [{}, UNTIED, {"num_kv_heads": 8}, {"num_kv_heads": 1}])
def test_a_gguf_gives_the_tensors_it_was_made_from(tmp_path: Path, sizes: dict[str, Any]) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", **sizes)
    assert_equal(load(path), tiny_tensors(TinyLlama(**sizes)))


@pytest.mark.parametrize(
    ("kind", "bound"), [("F16", 1e-3), ("BF16", 5e-3), ("Q8_0", 0.01), ("Q4_1", 0.1), ("Q4_0", 0.1)]
)
def test_a_quantized_gguf_is_dequantized(tmp_path: Path, kind: str, bound: float) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    tensors = load(path)
    for name, expected in tiny_tensors(TinyLlama()).items():
        assert (tensors[name] - expected).norm() / expected.norm() < bound, name
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_equal(load(path, torch.bfloat16), rounded)


def test_a_gguf_is_dequantized_once_per_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    first = load(path)
    monkeypatch.setattr("engine.weights.load.dequantized_tensors", None)  # fails if called
    assert_equal(load(path), first)
    with pytest.raises(TypeError):
        load(path, torch.bfloat16)


def test_transformers_computes_the_same_from_either_source(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "m", **UNTIED)
    checkpoint = open_checkpoint(str(write_tiny_gguf(tmp_path / "m.gguf", **UNTIED)))
    ids = torch.arange(40)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        one, other = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for path in (folder, hf_folder(checkpoint, torch.float32))
        )
    assert torch.equal(one, other)


def test_a_gguf_cut_off_after_opening_is_named(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(path))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        CheckpointError, match=r"m\.gguf is truncated: blk\.1\.ffn_down\.weight ends at"
    ):
        load_weights(checkpoint, torch.float32)
    assert not list(cache.rglob("model.safetensors"))


def test_a_gguf_replaced_after_opening_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(path))
    write_tiny_gguf(path, seed=1)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        load_weights(checkpoint, torch.float32)
    assert not list(cache.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"blk.0.attn_sinks.weight": np.ones(8, "f4")}, r"surplus blk\.0\.attn_sinks\.weight"),
        ({"blk.2.attn_norm.weight": np.ones(64, "f4")}, r"surplus model\.layers\.2\.input"),
    ],
)
def test_tensors_of_a_gguf_that_do_not_fit_are_named(
    tmp_path: Path, extra: dict[str, Any], named: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", extra_tensors=extra)
    with pytest.raises(CheckpointError, match=f"{path}: .*{named}"):
        load(path)


def test_a_quantization_without_a_decoder_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(str(path))
    index = checkpoint.folder / "gguf_tensors.json"
    index.write_text(index.read_text().replace('"kind": "F32"', '"kind": "F64"'))
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is stored as F64"):
        load_weights(checkpoint, torch.float32)
