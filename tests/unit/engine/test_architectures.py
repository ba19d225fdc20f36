"""Every architecture computes what transformers computes, loaded from its own checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architecture_check import NUM_TOKENS, assert_equals_oracle, engine_for, score
from support.tiny_architectures import VARIANTS, Variant, oracle_logits, save_variant
from support.tiny_engine import tokens

from baton.checkpoint.architectures import ARCHITECTURES
from baton.checkpoint.checkpoint import open_checkpoint
from baton.errors import CheckpointError
from engine.weights.dummy import dummy_tensors
from engine.weights.load import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, variant: Variant) -> None:
    model = save_variant(tmp_path, variant)
    assert_equals_oracle(engine_for(tmp_path), model)


@pytest.mark.parametrize(
    "name",
    [
        "mistral, window",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen3 moe",
        "smollm3",
        "deepseek v2",
        "deepseek v3",
    ],
)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(tmp_path: Path, name: str) -> None:
    model = save_variant(tmp_path, VARIANTS[name])
    token_ids = tokens(NUM_TOKENS)
    exact = oracle_logits(model, token_ids)
    out = score(engine_for(tmp_path, dtype=torch.bfloat16), token_ids, [33, 1, 41])
    assert out.dtype == torch.float32
    theirs = oracle_logits(model.bfloat16(), token_ids).float()

    def error(logits: torch.Tensor) -> torch.Tensor:
        """Of the middle token: where rounding changes the choice of an expert, one is far off."""
        return ((logits - exact).norm(dim=-1) / exact.norm(dim=-1)).median()

    assert error(out) < 1.25 * error(theirs)


def test_every_architecture_is_tried() -> None:
    tried = {f"{variant.architecture}ForCausalLM" for variant in VARIANTS.values()}
    assert tried == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "qwen3", "mixtral", "qwen3 moe", "deepseek v3"]
)
def test_a_sharded_folder_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    save_variant(single, VARIANTS[name])
    save_variant(sharded, VARIANTS[name], shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = load_weights(open_checkpoint(str(single)), torch.float32)
    found = load_weights(open_checkpoint(str(sharded)), torch.float32)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
NORM = "model.layers.0.self_attn.q_norm.weight"
BIAS = "model.layers.0.self_attn.v_proj.bias"
LATENT = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
CHOICE = "model.layers.2.mlp.gate.e_score_correction_bias"
SHARED = "model.layers.1.mlp.shared_experts.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mixtral", {EXPERT: None}, rf"missing {EXPERT} \[64, 96\]"),
        ("mixtral", {EXPERT: torch.ones(96, 64)}, rf"misshapen {EXPERT} is \[96, 64\]"),
        ("mixtral", {EXPERT.replace("3", "4"): torch.ones(64, 96)}, r"surplus .*experts\.4\.w2"),
        ("qwen3", {NORM: None}, rf"missing {NORM} \[24\]"),
        ("qwen3", {NORM: torch.ones(64)}, rf"misshapen {NORM} is \[64\], expected \[24\]"),
        ("qwen2", {BIAS: None}, f"missing {BIAS}"),
        ("qwen2", {BIAS.replace("v_", "o_"): torch.ones(64)}, r"surplus .*o_proj\.bias"),
        ("mistral", {BIAS: torch.ones(32)}, f"surplus {BIAS}"),
        ("deepseek v2", {LATENT: torch.ones(24, 64)}, rf"{LATENT} is .*, expected \[32, 64\]"),
        ("deepseek v2", {SHARED: None}, rf"missing {SHARED} \[80, 64\]"),
        ("deepseek v2", {CHOICE: torch.ones(8)}, f"surplus {CHOICE}"),
        ("deepseek v3", {CHOICE: None}, rf"missing {CHOICE} \[8\]"),
        ("deepseek v3", {"model.layers.4.eh_proj.weight": torch.ones(1)}, "surplus .*layers.4.eh"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_an_engine_is_made(
    tmp_path: Path, name: str, changes: Mapping[str, torch.Tensor | None], named: str
) -> None:
    save_variant(tmp_path, VARIANTS[name])
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(kept, path)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{named}"):
        engine_for(tmp_path)


def test_an_architecture_that_is_not_built_is_named(tmp_path: Path) -> None:
    save_variant(tmp_path, VARIANTS["llama"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["DeepseekV32ForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'DeepseekV32ForCausalLM' is not supported"):
        engine_for(tmp_path)


def test_layers_for_multi_token_prediction_are_left_alone_where_the_config_names_them(
    tmp_path: Path,
) -> None:
    """As in DeepSeek-V3's own checkpoint: whatever they hold, logits stay what they are."""
    model = save_variant(tmp_path, VARIANTS["deepseek v3"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.randn(64, 128)
    tensors["model.layers.3.mlp.gate.weight"] = torch.randn(3, 4).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("num_mtp_layers", None)

    def write(num_layers: int) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"num_nextn_predict_layers": num_layers})
        )

    write(1)
    assert_equals_oracle(engine_for(tmp_path), model)
    write(0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.\w.* is stored as|surplus"):
        engine_for(tmp_path)


def test_the_bias_that_chooses_experts_keeps_float32(tmp_path: Path) -> None:
    """In bfloat16 two biases that differ by less than its rounding would become one."""
    save_variant(tmp_path, VARIANTS["deepseek v3"])
    exact = load_file(tmp_path / "model.safetensors")[CHOICE]
    assert exact.dtype == torch.float32
    assert not torch.equal(exact, exact.bfloat16().float())
    checkpoint = open_checkpoint(str(tmp_path))
    weights = load_weights(checkpoint, torch.bfloat16)
    assert torch.equal(weights[CHOICE], exact)
    dummy = dummy_tensors(checkpoint.config, torch.bfloat16)
    assert dummy[CHOICE].dtype == torch.float32
    for tensors in (weights, dummy):
        others = {t.dtype for name, t in tensors.items() if not name.endswith("correction_bias")}
        assert others == {torch.bfloat16}
