"""What the layers of a decoder are made of, where architectures differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from baton.checkpoint.config_fields import ConfigFields


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of the dense MLP.

    ``normalizes`` says whether the chosen experts' weights are scaled to a sum of 1.
    ``dense_layers`` have the dense MLP all the same. The names are those of the tensors
    in one layer: the block's, and an expert's gate, up and down projections.

    ``scoring`` makes an expert's score of the router's output. Where ``has_choice_bias``,
    experts are chosen by their scores and a bias each; weights come from the scores alone,
    times ``weights_scale``. The experts lie in ``num_groups`` groups, of which only
    ``num_chosen_groups`` are chosen from: those with the largest sums of their best
    ``num_summed`` experts. ``shared_intermediate_size`` is that of an MLP that every token
    goes through beside its experts; 0 where there is none.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    normalizes: bool
    dense_layers: frozenset[int] = frozenset()
    block_name: str = "mlp"
    gate_name: str = "gate_proj"
    up_name: str = "up_proj"
    down_name: str = "down_proj"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    has_choice_bias: bool = False
    weights_scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    num_summed: int = 1
    shared_intermediate_size: int = 0


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024) in place of grouped-query attention.

    A token's keys and values, those of all heads, are made from one latent vector of
    ``kv_rank`` elements, and its queries from one of ``query_rank``, if that is not None.
    A query and a key are ``plain_dim`` elements and ``rotary_dim`` more that have the
    rotary embedding; those of the key are the same for all heads. ``turns_neighbours``
    says that the embedding turns pairs (2i, 2i+1), not (i, i + rotary_dim / 2).
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    turns_neighbours: bool = True

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.rotary_dim

    @property
    def cached_dim(self) -> int:
        """Elements that are kept of a token: its latent vector, and the rotated part of its key."""
        return self.kv_rank + self.rotary_dim


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """The defaults are those of a Llama without biases.

    ``windows`` has one entry a layer: how many tokens it attends to, itself included,
    or None for all. It is empty where no layer has a window. ``unrotated_layers`` have
    no position embedding. With ``latent`` attention ``qkv_bias`` is that of the projections
    to the latent vectors. ``num_draft_layers`` come behind the others, for multi-token
    prediction: a checkpoint has their tensors, and nothing here uses them.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    unrotated_layers: frozenset[int] = frozenset()
    moe: MoeConfig | None = None
    latent: LatentConfig | None = None
    num_draft_layers: int = 0

    def within(self, max_position: int) -> DecoderParts:
        """Without windows as long as the longest context: they never cut anything off."""
        windows = tuple(w if w is not None and w < max_position else None for w in self.windows)
        return replace(self, windows=windows if any(windows) else ())

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense_layers


def same_window(fields: ConfigFields, window: int | None) -> tuple[int | None, ...]:
    """``windows`` of a model with one window, if any, in every layer."""
    kinds = fields.items("layer_types", str) or ()
    if set(kinds) - {"full_attention"}:
        fields.fail(f"layer_types {sorted(set(kinds))} is not supported for this architecture")
    return () if window is None else (window,) * fields.count("num_hidden_layers")


def named_window(fields: ConfigFields, default: int | None) -> int | None:
    """``sliding_window``; null there means none, and ``default`` is taken where it is absent."""
    if "sliding_window" in fields.data and fields.get("sliding_window") is None:
        return None
    if default is None and "sliding_window" not in fields.data:
        return None
    return fields.count("sliding_window", default)


def qwen_window(fields: ConfigFields) -> int | None:
    """Qwen's window counts only where ``use_sliding_window`` is set."""
    return named_window(fields, 4096) if fields.flag("use_sliding_window") else None


def qwen_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """``windows`` by ``layer_types``, else of the layers from ``max_window_layers`` on."""
    num_layers, window = fields.count("num_hidden_layers"), qwen_window(fields)
    kinds = fields.items("layer_types", str)
    if kinds is None:
        first = fields.get("max_window_layers")
        first = 28 if first is None else first
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            fields.fail(f"max_window_layers is {first!r:.80}; expected a whole number")
        kinds = ("full_attention",) * min(first, num_layers) + ("sliding_attention",) * num_layers
        if window is None:
            return ()
    if len(kinds) < num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        fields.fail(
            f"layer_types {list(kinds)!r:.120} is not supported; expected full_attention or "
            f"sliding_attention for each of {num_layers} layers"
        )
    kinds = kinds[:num_layers]
    if window is None and "sliding_attention" in kinds:
        fields.fail("layer_types has sliding_attention, but there is no window: set sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
