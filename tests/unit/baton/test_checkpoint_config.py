"""Reading config.json: both generations of fields, and every refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import TinyLlama, config_json

from baton.checkpoint.decoder_parts import DecoderParts
from baton.checkpoint.model_config import ModelConfig
from baton.checkpoint.rope_config import RopeConfig
from baton.errors import CheckpointError


def read(**changes: Any) -> ModelConfig:
    data = config_json(TinyLlama()) | changes
    return ModelConfig.from_json(
        {k: v for k, v in data.items() if v is not ...}, where="config.json"
    )


def test_all_fields_are_read() -> None:
    config = read(attention_bias=True, rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=32)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=288,
        max_position=1024,
        rope=RopeConfig(10000.0),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        parts=DecoderParts(qkv_bias=True, out_bias=True),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": ..., "rope_theta": 500000},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0},
        # Contexts end where it would begin to count.
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_rope_theta_is_found_where_either_transformers_writes_it(changes: dict[str, Any]) -> None:
    assert read(**changes).rope == RopeConfig(5e5)


def test_absent_optional_fields_take_the_defaults_of_llama() -> None:
    config = read(
        num_key_value_heads=...,
        head_dim=None,
        rope_parameters=...,
        rms_norm_eps=...,
        tie_word_embeddings=...,
        attention_bias=...,
        mlp_bias=...,
    )
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (8, 8, 10000.0)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings
    assert config.parts == DecoderParts()


MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}
MIXTRAL = {"architectures": ["MixtralForCausalLM"]}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}
WINDOW = {"use_sliding_window": True, "sliding_window": 512}


@pytest.mark.parametrize("length", [1024, 2000, None])
def test_a_window_that_cuts_nothing_off_is_none(length: int | None) -> None:
    """Nor does Mistral know of biases, whatever its config says."""
    assert read(**MISTRAL, sliding_window=length, attention_bias=True).parts == DecoderParts()


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({**MISTRAL, "sliding_window": 512}, (512, 512)),
        # transformers assumes a window of 4096 where Mistral's config names none.
        ({**MISTRAL, "max_position_embeddings": 8192}, (4096, 4096)),
        ({**MIXTRAL, "max_position_embeddings": 8192}, ()),
        ({**MIXTRAL, "sliding_window": 512}, (512, 512)),
        ({**QWEN2, "sliding_window": 512}, ()),
        ({**QWEN2, **WINDOW}, ()),  # from layer 28 on
        ({**QWEN2, **WINDOW, "max_window_layers": 0}, (512, 512)),
        ({**QWEN3, **WINDOW, "max_window_layers": 1}, (None, 512)),
        ({**QWEN2, **WINDOW, "sliding_window": None, "max_window_layers": 0}, ()),
        (
            {**QWEN2, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
            (512, None),
        ),
        ({**QWEN2, "layer_types": ["full_attention"] * 2}, ()),
        ({**QWEN3_MOE, **WINDOW}, (512, 512)),
        ({**QWEN3_MOE, "sliding_window": 512}, ()),
    ],
)
def test_each_layer_gets_its_window(
    changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(**changes).parts.windows == windows


def test_yarn_reaches_as_far_as_it_stretches() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    assert read(rope_parameters=yarn).max_position == 4096
    stretched = {**yarn, "original_max_position_embeddings": 256}
    assert read(rope_parameters=stretched).max_position == 1024
    assert read(**MISTRAL, rope_parameters=yarn, sliding_window=1024).parts.windows == (1024,) * 2


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("section", "rope"),
    [
        ({"rope_type": "linear", "factor": 2}, RopeConfig(1e4, "linear", factor=2.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            RopeConfig(1e4, "llama3", factor=8.0, original_max_position=256),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "truncate": False},
            RopeConfig(
                1e4,
                "yarn",
                factor=4.0,
                original_max_position=1024,
                beta_fast=16.0,
                truncate=False,
            ),
        ),
    ],
)
def test_scaled_rope_is_read_from_either_place(
    place: str, section: dict[str, Any], rope: RopeConfig
) -> None:
    theta = {"rope_theta": 1e4}
    written = {"rope_parameters": ..., **theta, place: section}
    if place == "rope_parameters":
        written = {place: {**section, **theta}}
    assert read(**written).rope == rope


def test_layers_without_experts_or_rotation_are_found() -> None:
    sparse_second = read(**QWEN3_MOE, decoder_sparse_step=2)
    assert [sparse_second.parts.is_sparse(layer) for layer in range(2)] == [False, True]
    dense_second = read(**QWEN3_MOE, mlp_only_layers=[1])
    assert [dense_second.parts.is_sparse(layer) for layer in range(2)] == [True, False]
    assert read(**QWEN3_MOE, intermediate_size=...).intermediate_size == 0
    assert read(**SMOLLM3, no_rope_layers=[0, 1]).parts.unrotated_layers == {0}
    assert read(**SMOLLM3, num_hidden_layers=8).parts.unrotated_layers == {3, 7}
    assert read(**SMOLLM3, tie_word_embeddings=...).tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ...}, "None.*LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "su"}}, "rope_parameters of type 'su'.*yarn"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"rope_parameters": {"mrope_section": [1, 1, 2]}}, "mrope_section is not supported"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0, 1.0, 1.0, 2.0],
                }
            },
            "short_factor and long_factor differ",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "both given"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**MISTRAL, "layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({**QWEN2, "layer_types": ["sliding_attention"] * 2}, "layer_types.*sliding_window"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types.*2 layers"),
        ({**QWEN2, "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({**SMOLLM3, "use_sliding_window": True}, "use_sliding_window"),
        ({**QWEN3, "head_dim": ...}, "head_dim is missing"),
        ({**MISTRAL, "sliding_window": None, "num_key_value_heads": ...}, "num_key_value_heads"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{named}"):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"hidden_size": 60, "head_dim": ...}, "hidden_size 60 is no multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({**MISTRAL, "sliding_window": "x"}, "sliding_window is 'x'"),
        ({**QWEN2, **WINDOW, "max_window_layers": -1}, "max_window_layers is -1"),
        ({**QWEN2, "layer_types": "full"}, "layer_types is 'full'"),
        ({**QWEN3_MOE, "num_experts": ...}, "num_experts is missing"),
        ({**QWEN3_MOE, "num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({**QWEN3_MOE, "mlp_only_layers": ["1"]}, "mlp_only_layers"),
        ({**SMOLLM3, "no_rope_layers": [1]}, "no_rope_layers has 1 entries; expected 2"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor is 0"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                }
            },
            "high_freq_factor 1.0 is not over",
        ),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{named}"):
        read(**changes)
