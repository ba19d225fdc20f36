"""The rotary embedding that a ``config.json`` asks for, and how it is scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from baton.checkpoint.config_fields import ConfigFields, is_positive

RopeKind = Literal["default", "linear", "llama3", "yarn", "factors"]

_KEYS = {
    "default": set[str](),
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "original", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original", "short_factor", "long_factor", "attention_factor"},
    "yarn": {
        *("factor", "original", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
}
"""What each kind of transformers reads besides its name and base."""

_ORIGINAL = "original_max_position_embeddings"
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of base ``theta``; the other fields are those of ``kind``.

    ``factors`` (of ``kind`` "factors") divides each frequency by its own number.
    ``attention_factor`` scales cosines and sines.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    factors: tuple[float, ...] = ()

    def magnitude(self, mscale: float) -> float:
        """What YaRN multiplies queries and keys by, each, at ``factor`` times the length."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


def read_rope(fields: ConfigFields, *, default_theta: float, head_dim: int) -> RopeConfig:
    """From the fields of either generation of transformers.

    Version 5 writes ``rope_parameters: {rope_type, rope_theta, ...}``; before it,
    ``rope_theta`` stood at the top and ``rope_scaling`` was null unless scaled.

    Raises CheckpointError, naming it, for a kind or a setting that is not built.
    """
    _refuse_partial(fields)
    scaling, section = fields.section("rope_scaling"), fields.section("rope_parameters")
    if scaling.data and section.data:
        fields.fail("rope_scaling and rope_parameters are both given; one of them has to go")
    name, section = ("rope_scaling", scaling) if scaling.data else ("rope_parameters", section)
    theta = section.positive("rope_theta", fields.positive("rope_theta", default_theta))
    kind = section.get("rope_type")
    kind = section.get("type") if kind is None else kind
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in _KEYS:
        fields.fail(
            f"{name} of type {kind!r:.80} is not supported; "
            f"supported are {', '.join(sorted(_KEYS))}"
        )
    known = {_ORIGINAL if key == "original" else key for key in _KEYS[kind]} | _COMMON
    if unknown := sorted(section.data.keys() - known):
        fields.fail(f"{name} of type {kind!r}: {', '.join(unknown)} is not supported")
    _refuse_partial(section)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "dynamic":
        # Below max_position_embeddings, where every context ends, it changes nothing.
        section.positive("factor")
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=section.positive("factor"))
    original = _original(fields, section)
    if kind == "llama3":
        return _llama3(section, theta, original)
    if kind == "yarn":
        return _yarn(section, theta, original)
    return _equal_factors(section, theta, head_dim)


def _refuse_partial(fields: ConfigFields) -> None:
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        fields.fail("partial_rotary_factor other than 1 is not supported")


def _original(fields: ConfigFields, section: ConfigFields) -> int:
    """Like transformers: at the top of config.json it wins over the section."""
    for place in (fields, section):
        if place.get(_ORIGINAL) is not None:
            return place.count(_ORIGINAL)
    return fields.count("max_position_embeddings")


def _llama3(section: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
    if high <= low:
        section.fail(f"high_freq_factor {high} is not over low_freq_factor {low}")
    return RopeConfig(
        theta,
        "llama3",
        factor=section.positive("factor"),
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(section: ConfigFields, theta: float, original: int) -> RopeConfig:
    if theta == 1:
        section.fail("rope_theta is 1; YaRN divides by its logarithm, which is 0 then")

    def optional(name: str) -> float | None:
        return None if section.get(name) is None else section.positive(name)

    return RopeConfig(
        theta,
        "yarn",
        factor=section.positive("factor"),
        original_max_position=original,
        beta_fast=section.positive("beta_fast", 32.0),
        beta_slow=section.positive("beta_slow", 1.0),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=section.flag("truncate", True),
        attention_factor=optional("attention_factor"),
    )


def _equal_factors(section: ConfigFields, theta: float, head_dim: int) -> RopeConfig:
    """LongRoPE whose short and long factors are the same, which no context switches."""
    short = section.items("short_factor", float, int)
    if short is None or short != section.items("long_factor", float, int):
        section.fail("longrope whose short_factor and long_factor differ is not supported")
    if len(short) != head_dim // 2 or not all(map(is_positive, short)):
        section.fail(f"short_factor has to be {head_dim // 2} numbers over 0")
    return RopeConfig(
        theta,
        "factors",
        factors=tuple(float(value) for value in short),
        attention_factor=section.positive("attention_factor"),
    )
