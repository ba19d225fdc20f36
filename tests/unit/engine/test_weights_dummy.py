"""Dummy weights: any model's shapes without its weights, equal in every process that draws them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.architecture_check import engine_for
from support.tiny_architecture_gguf import gguf_of
from support.tiny_architectures import VARIANTS, save_variant
from support.tiny_engine import generate, prompt, tokens

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import parse_config
from baton.errors import CheckpointError
from engine.setup import plan_engine
from engine.weights.dummy import dummy_tensors
from engine.weights.load import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mixtral", "qwen3 moe", "deepseek v3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    save_variant(tmp_path / "m", VARIANTS[request.param])
    (tmp_path / "m" / "model.safetensors").unlink()
    return tmp_path / "m"


def test_a_folder_without_weights_generates(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        engine_for(folder)
    emitted = generate(engine_for(folder, "dummy"), prompt(tokens(40)), 8)
    assert len(emitted) == 8
    assert emitted == generate(engine_for(folder, "dummy"), prompt(tokens(40)), 8)


def test_they_have_the_shapes_of_the_real_ones_and_depend_on_the_seed_alone(
    tmp_path: Path,
) -> None:
    save_variant(tmp_path / "m", VARIANTS["mixtral"])
    real = load_weights(open_checkpoint(str(tmp_path / "m")), torch.float32)
    checkpoint = open_checkpoint(str(tmp_path / "m"), "dummy")
    dummy = load_weights(checkpoint, torch.float32)
    assert {n: t.shape for n, t in dummy.items()} == {n: t.shape for n, t in real.items()}
    same = dummy_tensors(checkpoint.config, torch.float32)
    other = dummy_tensors(checkpoint.config, torch.float32, seed=1)
    rounded = dummy_tensors(checkpoint.config, torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert all(torch.equal(dummy[key], same[key]) for key in dummy)
    assert not torch.equal(dummy[name], other[name])
    assert not torch.equal(dummy[name], dummy[name.replace("experts.1", "experts.2")])
    assert torch.equal(dummy[name].bfloat16(), rounded[name])


def test_the_revision_tells_them_from_the_real_ones(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for path, name in zip(folders, ("llama", "qwen2"), strict=True):
        save_variant(path, VARIANTS[name])
    gguf = gguf_of(tmp_path / "a.gguf", folders[0])
    sources = [*folders, gguf]
    revisions = [
        open_checkpoint(str(path), load_format).revision
        for path in sources
        for load_format in ("auto", "dummy")
    ]
    assert len(set(revisions)) == 6
    assert revisions[5] == open_checkpoint(str(gguf), "dummy").revision
    found = load_weights(open_checkpoint(str(gguf), "dummy"), torch.float32)
    assert not torch.equal(
        found["model.embed_tokens.weight"],
        load_weights(open_checkpoint(str(gguf)), torch.float32)["model.embed_tokens.weight"],
    )


def test_workers_with_dummy_weights_never_pair_with_real_ones(tmp_path: Path) -> None:
    save_variant(tmp_path / "m", VARIANTS["llama"])
    digests = {
        plan_engine(
            parse_config({"model": str(tmp_path / "m"), "engine": {"load_format": load_format}}),
            secret="s",
        ).digest
        for load_format in ("auto", "dummy")
    }
    assert len(digests) == 2
