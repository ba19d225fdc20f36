"""The KV of two models: what hand-offs are measured with."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kv_layout import KvLayout

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """The KV of a model, in bfloat16."""

    name: str
    title: str
    num_kv_heads: int
    num_layers: int
    head_dim: int

    def layout(self, num_blocks: int) -> KvLayout:
        return KvLayout(
            num_blocks=num_blocks,
            num_kv_heads=self.num_kv_heads,
            num_layers=self.num_layers,
            block_size=BLOCK_SIZE,
            head_dim=self.head_dim,
            dtype="bfloat16",
        )

    def layout_within(self, num_bytes: int) -> KvLayout:
        """The largest pool of at most so many bytes, its scratch block not counted."""
        return self.layout(num_bytes // self.layout(1).block_bytes)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2", "SmolLM2-135M", num_kv_heads=3, num_layers=30, head_dim=64),
        Shape("8b", "an 8B", num_kv_heads=8, num_layers=32, head_dim=128),
    )
}
