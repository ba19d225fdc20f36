"""Reading config.json: both generations of fields, and every refusal by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support.tiny_models import TinyLlama, config_json

from baton.checkpoint.decoder_parts import DecoderParts, LatentConfig, MoeConfig
from baton.checkpoint.model_config import ModelConfig
from baton.checkpoint.rope_config import RopeConfig
from baton.errors import CheckpointError
from baton.kv_layout import KvLayout


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
DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_V3 = {
    **DEEPSEEK_V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 24,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
}
ORIGINAL = "original_max_position_embeddings"
YARN40 = {"type": "yarn", "factor": 40, ORIGINAL: 64}


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
        ({**QWEN2, **WINDOW, "max_window_layers": 10**12}, ()),
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


def test_deepseek_v2_is_read() -> None:
    config = read(**DEEPSEEK_V2)
    assert config.parts == DecoderParts(
        latent=LatentConfig(query_rank=None, kv_rank=32, plain_dim=16, rotary_dim=8, value_dim=12),
        moe=MoeConfig(
            num_experts=8,
            num_experts_per_token=3,
            intermediate_size=40,
            normalizes=False,
            dense_layers=frozenset({0}),
            shared_intermediate_size=80,
        ),
    )
    limited = read(**DEEPSEEK_V2 | {"topk_method": "group_limited_greedy"}).parts.moe
    assert limited is not None
    assert (limited.num_groups, limited.num_chosen_groups, limited.num_summed) == (4, 2, 1)


def test_deepseek_v3_is_read() -> None:
    parts = read(**DEEPSEEK_V3, rope_interleave=False, attention_bias=True).parts
    assert parts == DecoderParts(
        qkv_bias=True,
        out_bias=True,
        latent=LatentConfig(
            query_rank=24,
            kv_rank=32,
            plain_dim=16,
            rotary_dim=8,
            value_dim=12,
            turns_neighbours=False,
        ),
        moe=MoeConfig(
            num_experts=8,
            num_experts_per_token=3,
            intermediate_size=40,
            normalizes=True,
            dense_layers=frozenset({0}),
            scoring="sigmoid",
            has_choice_bias=True,
            weights_scale=2.5,
            num_groups=4,
            num_chosen_groups=2,
            num_summed=2,
            shared_intermediate_size=80,
        ),
        num_draft_layers=1,
    )
    assert read(**DEEPSEEK_V3 | {"num_nextn_predict_layers": ...}).parts.num_draft_layers == 0


def test_latent_attention_caches_one_row_for_all_heads() -> None:
    config = read(**DEEPSEEK_V2)
    layout = config.kv_layout(num_blocks=5, block_size=16, dtype="bfloat16")
    assert layout == KvLayout(5, 1, 2, 16, 32 + 8, "bfloat16", num_kv_parts=1)
    assert (config.value_dim, config.rotary_dim) == (32, 8)
    others = read().kv_layout(num_blocks=5, block_size=16, dtype="float32")
    assert others == KvLayout(5, 4, 2, 16, 8, "float32", num_kv_parts=2)


@pytest.mark.parametrize(
    ("section", "magnitude"),
    [
        (None, 1.0),
        (YARN40, 1.0),
        ({**YARN40, "mscale": 0.7}, 1.0),
        ({**YARN40, "mscale": 1.0, "mscale_all_dim": 0.707}, 0.0707 * math.log(40) + 1),
        ({"type": "linear", "factor": 4.0}, 1.0),
    ],
)
def test_scores_of_latent_attention_grow_with_mscale_all_dim(
    section: dict[str, Any] | None, magnitude: float
) -> None:
    changes = {"rope_parameters": ..., "rope_scaling": section}
    config = read(**DEEPSEEK_V2, **changes)
    assert config.attention_scale == pytest.approx(24**-0.5 * magnitude**2, rel=1e-12)
    assert read(**changes).attention_scale == 8**-0.5


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 0}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 9}, []),
        ({"moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": ..., "first_k_dense_replace": 3}, [3, 4, 5]),
    ],
)
def test_the_first_layers_of_deepseek_are_dense(changes: dict[str, Any], sparse: list[int]) -> None:
    parts = read(**DEEPSEEK_V2 | {"num_hidden_layers": 6} | changes).parts
    assert [layer for layer in range(6) if parts.is_sparse(layer)] == sparse


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM.*LlamaForCausalLM"),
        ({**DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({**DEEPSEEK_V3, "scoring_func": "softmax"}, "scoring_func 'softmax'.*'sigmoid'"),
        ({**DEEPSEEK_V3, "topk_method": "greedy"}, "topk_method 'greedy'.*'noaux_tc'"),
        ({**DEEPSEEK_V3, "norm_topk_prob": ...}, "norm_topk_prob is missing"),
        ({**DEEPSEEK_V3, "q_lora_rank": ...}, "q_lora_rank is missing"),
        ({**DEEPSEEK_V3, "routed_scaling_factor": ...}, "routed_scaling_factor is missing"),
        ({**DEEPSEEK_V3, "num_key_value_heads": 4}, "num_key_value_heads is 4.*heads 8"),
        ({**DEEPSEEK_V2, "scoring_func": "sigmoid"}, "scoring_func 'sigmoid'.*'softmax'"),
        ({**DEEPSEEK_V2, "topk_method": "noaux_tc"}, "topk_method 'noaux_tc'.*'greedy'"),
        ({**DEEPSEEK_V2, "topk_method": ...}, "topk_method None"),
        ({**DEEPSEEK_V2, "norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ({**DEEPSEEK_V2, "mlp_bias": True}, "mlp_bias is not supported"),
        ({**DEEPSEEK_V2, "n_shared_experts": None}, "n_shared_experts is missing"),
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
        ({"hidden_act": 0}, "hidden_act 0"),
        ({"hidden_act": []}, r"hidden_act \[\]"),
        ({"hidden_act": {}}, r"hidden_act \{\}"),
        ({"rope_parameters": {"rope_type": 0}}, "rope_parameters of type 0"),
        ({"rope_parameters": {"type": []}}, r"rope_parameters of type \[\]"),
        ({"rope_scaling": 0}, "rope_scaling is 0; expected an object"),
        ({"rope_scaling": []}, r"rope_scaling is \[\]"),
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
        ({**DEEPSEEK_V2, "qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ({**DEEPSEEK_V2, "first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({**DEEPSEEK_V2, "num_experts_per_tok": 9}, "num_experts_per_tok 9"),
        ({**DEEPSEEK_V3, "n_group": 3}, "n_group 3 and topk_group 2 do not fit"),
        ({**DEEPSEEK_V3, "n_group": 8, "topk_group": 4}, "n_group 8 and topk_group 4"),
        ({**DEEPSEEK_V3, "topk_group": 5}, "n_group 4 and topk_group 5"),
        ({**DEEPSEEK_V3, "num_experts_per_tok": 5}, "do not fit .*num_experts_per_tok 5"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {**YARN40, "rope_theta": 1}}, "rope_parameters: rope_theta is 1;"),
        ({"rope_parameters": ..., "rope_theta": 1.0, "rope_scaling": YARN40}, "rope_theta is 1;"),
        # Numbers of turns whose wave is longer than any float.
        ({"rope_parameters": {**YARN40, "beta_fast": 5e-324}}, "beta_fast is 5e-324"),
        ({"rope_parameters": {**YARN40, ORIGINAL: 10**400}}, f"{ORIGINAL} is 1000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; expected 10000 or"),
        ({"num_attention_heads": 10**12}, "num_attention_heads is 1000000000000; expected 65536"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; expected 2147483647 or less"),
        ({**MIXTRAL, "num_local_experts": 10**12}, "num_local_experts is 1000000000000; expected"),
        (
            {**MIXTRAL, "num_local_experts": 10**6},
            "1000000 experts in each of 2 layers .*1,000,000",
        ),
        ({**QWEN3_MOE, "num_experts": 10**6}, "1000000 experts in each of 2 layers"),
        ({**DEEPSEEK_V2, "n_routed_experts": 10**6}, "1000000 experts in each of 2 layers"),
        ({**DEEPSEEK_V3, "num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers is 1000000"),
        ({**DEEPSEEK_V3, "num_mtp_layers": []}, r"num_mtp_layers is \[\]"),
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
