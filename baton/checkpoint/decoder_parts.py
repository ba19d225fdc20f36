"""What the layers of a decoder are made of, where architectures differ from each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.checkpoint.config_fields import ConfigFields


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of the dense MLP.

    ``normalizes`` says whether the chosen experts' weights are scaled to a sum of 1.
    ``dense_layers`` have the dense MLP all the same. The names are those of the tensors
    in one layer: the block's, and an expert's gate, up and down projections.
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


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """The defaults are those of a Llama without biases.

    ``windows`` has one entry a layer: how many tokens it attends to, itself included,
    or None for all. It is empty where no layer has a window. ``unrotated_layers`` have
    no position embedding.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    unrotated_layers: frozenset[int] = frozenset()
    moe: MoeConfig | None = None

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
            fields.fail(f"max_window_layers is {first!r}; expected a whole number")
        kinds = ("full_attention",) * first + ("sliding_attention",) * num_layers
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
