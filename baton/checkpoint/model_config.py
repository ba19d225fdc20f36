"""What the engine must know of a model: its ``config.json``, read strictly.

A setting that would change the computation and is not built is refused by name:
an answer that is silently wrong is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.checkpoint.architectures import ARCHITECTURES
from baton.checkpoint.config_fields import ConfigFields
from baton.checkpoint.decoder_parts import DecoderParts
from baton.checkpoint.rope_config import RopeConfig, read_rope
from baton.kv_layout import KvDtype, KvLayout

_MOST_LAYERS = 10_000
_MOST_HEADS = 65_536
_MOST_EXPERTS = 1_000_000
"""Of all layers together. Each has tensors of its own, whose names are made before anything is
read: with more, a mistyped number would fill the memory. DeepSeek-V3 has 15,616."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one decoder. ``architecture`` is a key of ARCHITECTURES.

    ``intermediate_size`` is that of the dense MLPs; 0 where no layer has one.
    ``num_kv_heads`` and ``head_dim`` are those of what is cached: with latent attention
    one head of the latent vector and the rotated key, whatever the heads made from it.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    parts: DecoderParts

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str) -> ModelConfig:
        """Reads the content of a Hugging Face ``config.json``; ``where`` names it in errors.

        Raises CheckpointError for an architecture or a setting that is not supported,
        and for sizes that are missing or do not fit together.
        """
        fields = ConfigFields(data, where)
        name = _architecture(fields)
        entry = ARCHITECTURES[name]
        for required in entry.required:
            if fields.get(required) is None:
                fields.fail(f"{required} is missing")
        num_layers = fields.count("num_hidden_layers", most=_MOST_LAYERS)
        num_heads = fields.count("num_attention_heads", most=_MOST_HEADS)
        hidden_size = fields.count("hidden_size")
        parts = entry.parts(fields)
        if parts.latent is not None:
            num_kv_heads, head_dim = 1, parts.latent.cached_dim
            rotary_dim = parts.latent.rotary_dim
        else:
            num_kv_heads = fields.count("num_key_value_heads", num_heads)
            rotary_dim = head_dim = fields.count("head_dim", hidden_size // num_heads)
        rope = read_rope(fields, default_theta=entry.rope_theta, head_dim=rotary_dim)
        max_position = _max_position(fields, rope)
        has_dense = any(not parts.is_sparse(layer) for layer in range(num_layers))
        config = cls(
            architecture=name,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size") if has_dense else 0,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=fields.count("vocab_size"),
            max_position=max_position,
            rope=rope,
            rms_norm_eps=fields.positive("rms_norm_eps", entry.rms_norm_eps),
            tie_word_embeddings=fields.flag("tie_word_embeddings", entry.tie_word_embeddings),
            parts=parts.within(max_position),
        )
        _check_sizes(config, fields)
        return config

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that have the rotary embedding."""
        return self.parts.latent.rotary_dim if self.parts.latent is not None else self.head_dim

    @property
    def value_dim(self) -> int:
        """Elements of what attention sums up, as it is cached."""
        return self.parts.latent.kv_rank if self.parts.latent is not None else self.head_dim

    @property
    def attention_scale(self) -> float:
        """What attention's scores are multiplied by."""
        if self.parts.latent is None:
            return float(self.head_dim**-0.5)
        magnitude = self.rope.magnitude(self.rope.mscale_all_dim or 0.0)
        return float(self.parts.latent.query_dim**-0.5 * magnitude**2)

    def kv_layout(self, *, num_blocks: int, block_size: int, dtype: KvDtype) -> KvLayout:
        """A pool that caches this model's tokens."""
        return KvLayout(
            num_blocks=num_blocks,
            num_kv_heads=self.num_kv_heads,
            num_layers=self.num_layers,
            block_size=block_size,
            head_dim=self.head_dim,
            dtype=dtype,
            num_kv_parts=1 if self.parts.latent is not None else 2,
        )


def _architecture(fields: ConfigFields) -> str:
    """The name of the entry. Raises CheckpointError for what no code here computes."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        fields.fail(f"architecture {name!r:.80} is not supported; supported are {supported}")
    if fields.get("quantization_config") is not None:
        fields.fail(
            "quantization_config is not supported; use an unquantized folder or a GGUF file"
        )
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        fields.fail(f"hidden_act {activation!r:.80} is not supported; supported is 'silu'")
    return name


def _max_position(fields: ConfigFields, rope: RopeConfig) -> int:
    """YaRN is often switched on in a config.json that still names the original length."""
    named = fields.count("max_position_embeddings")
    if rope.kind != "yarn":
        return named
    return max(named, int(rope.factor * rope.original_max_position))


def _check_sizes(config: ModelConfig, fields: ConfigFields) -> None:
    has_heads = config.parts.latent is None
    if has_heads and fields.get("head_dim") is None and config.hidden_size % config.num_heads:
        fields.fail(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_heads}, and head_dim is missing"
        )
    if config.num_heads % config.num_kv_heads:
        fields.fail(
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
            f"{config.num_kv_heads}"
        )
    if config.rotary_dim % 2:
        name = "head_dim" if has_heads else "qk_rope_head_dim"
        fields.fail(f"{name} {config.rotary_dim} is odd; rotary embeddings need an even one")
    moe = config.parts.moe
    if moe is not None and moe.num_experts * config.num_layers > _MOST_EXPERTS:
        fields.fail(
            f"{moe.num_experts} experts in each of {config.num_layers} layers is not supported; "
            f"expected at most {_MOST_EXPERTS:,} in all layers together"
        )
    if moe is not None and moe.num_experts_per_token > moe.num_experts:
        fields.fail(
            f"num_experts_per_tok {moe.num_experts_per_token} is over the number of experts "
            f"{moe.num_experts}"
        )
