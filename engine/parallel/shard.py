"""Which part of a model one rank computes. Pure functions; ranges are given as slices.

Ranks are numbered expert group by expert group, of ``tensor`` ranks each::

    rank = expert_group * tensor + tensor_rank
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from baton.checkpoint.model_config import ModelConfig
from baton.kv_layout import KvLayout
from baton.parallelism import Parallelism

WHOLE = slice(None)


def part(num: int, size: int, index: int) -> slice:
    """The ``index``-th of ``size`` consecutive parts of ``num`` things; lengths differ by
    at most 1."""
    return slice(num * index // size, num * (index + 1) // size)


def scaled(things: slice, by: int) -> slice:
    """The rows of ``things`` that have ``by`` rows each."""
    return slice(things.start * by, things.stop * by)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank takes of every layer. The degrees fit the model (``check_parallelism``)."""

    parallel: Parallelism = field(default_factory=Parallelism)
    rank: int = 0

    @property
    def num_ranks(self) -> int:
        return self.parallel.num_ranks

    @property
    def expert_group(self) -> int:
        return self.rank // self.parallel.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.parallel.tensor

    def query_heads(self, config: ModelConfig) -> slice:
        return part(config.num_heads, self.num_ranks, self.rank)

    def kv_heads(self, config: ModelConfig) -> slice:
        """Those that this rank's query heads read; replicated where they are fewer than ranks."""
        num = max(1, config.num_kv_heads // self.num_ranks)
        first = self.rank * config.num_kv_heads // self.num_ranks
        return slice(first, first + num)

    def own_layout(self, config: ModelConfig, whole: KvLayout) -> KvLayout:
        """Of a pool with this rank's KV heads alone, where ranks share no memory."""
        heads = self.kv_heads(config)
        return replace(whole, num_kv_heads=heads.stop - heads.start)

    def inner(self, size: int) -> slice:
        """Of a dense MLP's features."""
        return part(size, self.num_ranks, self.rank)

    def expert_inner(self, size: int) -> slice:
        """Of an expert's features."""
        return part(size, self.parallel.tensor, self.tensor_rank)

    def experts(self, num_experts: int) -> range:
        owned = part(num_experts, self.parallel.expert, self.expert_group)
        return range(owned.start, owned.stop)

    def vocabulary(self, vocab_size: int) -> slice:
        """Equal parts but for the last ones, so that gathered logits need only be cut off."""
        width = -(-vocab_size // self.num_ranks)
        first = min(self.rank * width, vocab_size)
        return slice(first, min(first + width, vocab_size))

    def rows(self, num_rows: int) -> slice:
        """The tokens of a step whose experts this rank's group asks for."""
        return part(num_rows, self.parallel.expert, self.expert_group)
