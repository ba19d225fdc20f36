"""What the engine must know of a model: its ``config.json``, read strictly.

A setting that would change the computation and is not built is refused by name:
an answer that is silently wrong is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from baton.errors import CheckpointError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

# transformers' own default for a Mistral config.json that does not name its window.
_MISTRAL_DEFAULT_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and constants of one decoder of the Llama family."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str) -> ModelConfig:
        """Reads the content of a Hugging Face ``config.json``; ``where`` names it in errors.

        Raises CheckpointError for an architecture or a setting that is not supported,
        and for sizes that are missing or do not fit together.
        """
        fields = _Fields(data, where)
        mistral = _refuse_unsupported(fields)
        num_heads = fields.count("num_attention_heads")
        # Where a Mistral config omits its KV heads, transformers assumes 8; for Llama all heads.
        num_kv_heads = fields.count("num_key_value_heads", None if mistral else num_heads)
        hidden_size = fields.count("hidden_size")
        config = cls(
            architecture="llama",
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields.count("head_dim", hidden_size // num_heads),
            vocab_size=fields.count("vocab_size"),
            max_position=fields.count("max_position_embeddings"),
            rope_theta=_rope_theta(fields),
            rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            # Mistral's projections have no biases, whatever its config says.
            attention_bias=not mistral and fields.flag("attention_bias"),
            mlp_bias=not mistral and fields.flag("mlp_bias"),
        )
        _check_sizes(config, fields)
        return config


class _Fields:
    """Typed access to config.json; every complaint names the field and the file."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {message}")

    def get(self, name: str) -> Any:
        """The value, or None where it is absent or null."""
        return self.data.get(name)

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(f"{name} is {value!r}; expected a whole number of 1 or more")
        return int(value)

    def positive(self, name: str, default: float, within: Mapping[str, Any] | None = None) -> float:
        value = (self.data if within is None else within).get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            self.fail(f"{name} is {value!r}; expected a number over 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{name} is {value!r}; expected true or false")
        return bool(value)

    def section(self, name: str) -> Mapping[str, Any]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.fail(f"{name} is {value!r}; expected an object")
        return value


def _refuse_unsupported(fields: _Fields) -> bool:
    """True for Mistral. Raises CheckpointError for what no code here computes."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        fields.fail(f"architecture {name!r} is not supported; supported are {supported}")
    mistral = bool(name == "MistralForCausalLM")
    if fields.get("quantization_config") is not None:
        fields.fail(
            "quantization_config is not supported; use an unquantized folder or a GGUF file"
        )
    activation = fields.get("hidden_act") or "silu"
    if activation != "silu":
        fields.fail(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if mistral:
        named = "sliding_window" in fields.data
        window = fields.get("sliding_window") if named else _MISTRAL_DEFAULT_WINDOW
        # A window as long as the context never cuts anything off.
        if window is not None and (
            fields.count("sliding_window", window) < fields.count("max_position_embeddings")
        ):
            fields.fail(f"sliding_window {window} is not supported; only null is")
    return mistral


def _rope_theta(fields: _Fields) -> float:
    """The base of the rotary embedding, from the field of either generation of transformers.

    Version 5 writes ``rope_parameters: {rope_type, rope_theta}``; before it,
    ``rope_theta`` stood at the top and ``rope_scaling`` was null unless scaled.
    """
    theta = fields.positive("rope_theta", 10000.0)
    for name in ("rope_scaling", "rope_parameters"):
        section = fields.section(name)
        kind = section.get("rope_type", section.get("type")) or "default"
        if kind != "default":
            fields.fail(f"{name} of type {kind!r} is not supported; supported is 'default'")
        if section.get("partial_rotary_factor") not in (None, 1, 1.0):
            fields.fail(f"{name}: partial_rotary_factor other than 1 is not supported")
        theta = fields.positive("rope_theta", theta, section)
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        fields.fail("partial_rotary_factor other than 1 is not supported")
    return theta


def _check_sizes(config: ModelConfig, fields: _Fields) -> None:
    if fields.get("head_dim") is None and config.hidden_size % config.num_heads:
        fields.fail(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_heads}, and head_dim is missing"
        )
    if config.num_heads % config.num_kv_heads:
        fields.fail(
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
            f"{config.num_kv_heads}"
        )
    if config.head_dim % 2:
        fields.fail(f"head_dim {config.head_dim} is odd; rotary embeddings need an even one")
