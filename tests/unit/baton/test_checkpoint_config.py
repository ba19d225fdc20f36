"""Reading config.json: both generations of fields, and every refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny_models import TinyLlama, config_json

from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError


def read(**changes: Any) -> ModelConfig:
    data = config_json(TinyLlama()) | changes
    return ModelConfig.from_json(
        {k: v for k, v in data.items() if v is not ...}, where="config.json"
    )


def test_all_fields_are_read() -> None:
    config = read(attention_bias=True, rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=32)
    assert config == ModelConfig(
        architecture="llama",
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=288,
        max_position=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=False,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": ..., "rope_theta": 500000},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0},
    ],
)
def test_rope_theta_is_found_where_either_transformers_writes_it(changes: dict[str, Any]) -> None:
    assert read(**changes).rope_theta == 5e5


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
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (8, 8, 10000.0)
    assert config.rms_norm_eps == 1e-6
    flags = (config.tie_word_embeddings, config.attention_bias, config.mlp_bias)
    assert flags == (False, False, False)


MISTRAL = {"architectures": ["MistralForCausalLM"]}


def test_mistral_without_a_window_is_a_llama_without_biases() -> None:
    config = read(**MISTRAL, sliding_window=None, attention_bias=True)
    assert config == read(attention_bias=False)
    assert read(**MISTRAL, sliding_window=1024).architecture == "llama"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ...}, "None.*LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({**MISTRAL, "sliding_window": 512}, "sliding_window 512"),
        # transformers assumes a window of 4096 where Mistral's config names none.
        ({**MISTRAL, "max_position_embeddings": 8192}, "sliding_window 4096"),
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
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{named}"):
        read(**changes)
