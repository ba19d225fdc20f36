"""What DeepSeek-V2 and V3 name in config.json: latent attention, and experts in groups."""

from __future__ import annotations

from baton.checkpoint.config_fields import ConfigFields
from baton.checkpoint.decoder_parts import DecoderParts, LatentConfig, MoeConfig

_MOST_DRAFT_LAYERS = 1000


def deepseek_v2(fields: ConfigFields) -> DecoderParts:
    """Experts are scored by a softmax; a group counts as much as its best expert."""
    if fields.flag("norm_topk_prob"):
        fields.fail(
            "norm_topk_prob is not supported for this architecture: those who compute it "
            "disagree whether routed_scaling_factor counts then"
        )
    if fields.flag("mlp_bias"):
        fields.fail("mlp_bias is not supported for this architecture")
    _expect(fields, "scoring_func", None, "softmax")
    _expect(fields, "topk_method", "greedy", "group_limited_greedy")
    is_limited = fields.get("topk_method") == "group_limited_greedy"
    num_groups, num_chosen_groups = _groups(fields, num_summed=1) if is_limited else (1, 1)
    moe = MoeConfig(
        num_experts=fields.count("n_routed_experts"),
        num_experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        normalizes=False,
        dense_layers=_dense_layers(fields),
        weights_scale=fields.positive("routed_scaling_factor"),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        shared_intermediate_size=_shared_size(fields),
    )
    return _parts(fields, moe, turns_neighbours=True)


def deepseek_v3(fields: ConfigFields) -> DecoderParts:
    """Experts are scored by sigmoids and chosen with a bias each; a group counts as much
    as its best two. Layers for multi-token prediction are left alone."""
    _expect(fields, "scoring_func", None, "sigmoid")
    _expect(fields, "topk_method", None, "noaux_tc")
    num_groups, num_chosen_groups = _groups(fields, num_summed=2)
    moe = MoeConfig(
        num_experts=fields.count("n_routed_experts"),
        num_experts_per_token=fields.count("num_experts_per_tok"),
        intermediate_size=fields.count("moe_intermediate_size"),
        normalizes=fields.flag("norm_topk_prob"),
        dense_layers=_dense_layers(fields),
        scoring="sigmoid",
        has_choice_bias=True,
        weights_scale=fields.positive("routed_scaling_factor"),
        num_groups=num_groups,
        num_chosen_groups=num_chosen_groups,
        num_summed=2,
        shared_intermediate_size=_shared_size(fields),
    )
    return _parts(
        fields,
        moe,
        turns_neighbours=fields.flag("rope_interleave", True),
        # transformers 5 may write the second.
        num_draft_layers=fields.count(
            "num_nextn_predict_layers",
            fields.count("num_mtp_layers", 0, least=0, most=_MOST_DRAFT_LAYERS),
            least=0,
            most=_MOST_DRAFT_LAYERS,
        ),
    )


def _parts(
    fields: ConfigFields, moe: MoeConfig, *, turns_neighbours: bool, num_draft_layers: int = 0
) -> DecoderParts:
    bias = fields.flag("attention_bias")
    return DecoderParts(
        qkv_bias=bias,
        out_bias=bias,
        moe=moe,
        latent=_latent(fields, turns_neighbours=turns_neighbours),
        num_draft_layers=num_draft_layers,
    )


def _latent(fields: ConfigFields, *, turns_neighbours: bool) -> LatentConfig:
    num_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_kv_heads != num_heads:
        fields.fail(
            f"num_key_value_heads is {num_kv_heads}; latent attention makes keys and values "
            f"for each of num_attention_heads {num_heads}"
        )
    if "q_lora_rank" not in fields.data:
        fields.fail("q_lora_rank is missing; null says that queries have no latent vector")
    has_query_rank = fields.get("q_lora_rank") is not None
    return LatentConfig(
        query_rank=fields.count("q_lora_rank") if has_query_rank else None,
        kv_rank=fields.count("kv_lora_rank"),
        plain_dim=fields.count("qk_nope_head_dim"),
        rotary_dim=fields.count("qk_rope_head_dim"),
        value_dim=fields.count("v_head_dim"),
        turns_neighbours=turns_neighbours,
    )


def _dense_layers(fields: ConfigFields) -> frozenset[int]:
    """The first ones, and those that ``moe_layer_freq`` does not divide."""
    first, step = fields.count("first_k_dense_replace", least=0), fields.count("moe_layer_freq", 1)
    layers = range(fields.count("num_hidden_layers"))
    return frozenset(layer for layer in layers if layer < first or layer % step)


def _shared_size(fields: ConfigFields) -> int:
    return fields.count("n_shared_experts") * fields.count("moe_intermediate_size")


def _groups(fields: ConfigFields, *, num_summed: int) -> tuple[int, int]:
    """How many groups of experts there are, and from how many a token's are chosen."""
    num_groups, num_chosen_groups = fields.count("n_group"), fields.count("topk_group")
    num_experts, num_chosen = fields.count("n_routed_experts"), fields.count("num_experts_per_tok")
    size, rest = divmod(num_experts, num_groups)
    if (
        rest
        or size < num_summed
        or num_chosen_groups > num_groups
        or num_chosen > num_chosen_groups * size
    ):
        fields.fail(
            f"n_group {num_groups} and topk_group {num_chosen_groups} do not fit "
            f"n_routed_experts {num_experts} and num_experts_per_tok {num_chosen}"
        )
    return num_groups, num_chosen_groups


def _expect(fields: ConfigFields, name: str, *values: str | None) -> None:
    if (value := fields.get(name)) not in values:
        known = " or ".join(repr(each) for each in values if each is not None)
        fields.fail(f"{name} {value!r} is not supported for this architecture; expected {known}")
