"""How many ranks compute one worker's model, and which numbers a model can be split by."""

from __future__ import annotations

from dataclasses import dataclass

from baton.checkpoint.model_config import ModelConfig
from baton.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Parallelism:
    """The degrees of one worker. Attention, dense MLPs, embedding and head are split over
    all its ranks; experts over ``expert`` groups of ranks, each matrix of theirs over the
    ``tensor`` ranks of a group."""

    tensor: int = 1
    expert: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.expert


def valid_num_ranks(config: ModelConfig) -> list[int]:
    """Numbers of ranks that the query heads can be split over, and the KV heads split or
    replicated, so that every rank has its queries' KV heads and no others; and of which
    none is without rows of the vocabulary or without features."""
    narrowest = min(
        size
        for size in (
            config.vocab_size,
            config.intermediate_size,
            config.parts.moe.intermediate_size if config.parts.moe else 0,
        )
        if size
    )
    return [
        num
        for num in range(1, min(config.num_heads, narrowest) + 1)
        if _splits_heads(config, num) and _splits_vocabulary(config, num)
    ]


def _splits_heads(config: ModelConfig, num: int) -> bool:
    kv_heads = config.num_kv_heads
    return config.num_heads % num == 0 and (kv_heads % num == 0 or num % kv_heads == 0)


def _splits_vocabulary(config: ModelConfig, num: int) -> bool:
    """All parts are equal but for the last ones, so those may have nothing left: of 9 rows,
    ranks 0 to 2 of 4 take 3 each."""
    return -(-config.vocab_size // num) * (num - 1) < config.vocab_size


def valid_expert_sizes(config: ModelConfig) -> list[int]:
    moe = config.parts.moe
    if moe is None:
        return [1]
    return [num for num in range(1, moe.num_experts + 1) if moe.num_experts % num == 0]


def check_parallelism(config: ModelConfig, parallel: Parallelism, *, where: str) -> None:
    """Raises ConfigurationError, naming what is valid; ``where`` names the pool."""
    moe = config.parts.moe
    if parallel.expert not in (sizes := valid_expert_sizes(config)):
        has = f"has {moe.num_experts} experts" if moe is not None else "has no experts"
        raise ConfigurationError(
            f"{where}: expert_parallel_size is {parallel.expert}, but the model {has}; "
            f"valid: {_listed(sizes)}"
        )
    if parallel.num_ranks not in (nums := valid_num_ranks(config)):
        beside = [num // parallel.expert for num in nums if num % parallel.expert == 0]
        if parallel.expert == 1:
            ranks, valid = f"tensor_parallel_size {parallel.tensor}", f"valid: {_listed(nums)}"
        else:
            ranks = f"tensor_parallel_size {parallel.tensor} × expert_parallel_size "
            ranks += str(parallel.expert)
            valid = f"valid beside it for tensor_parallel_size: {_listed(beside) or 'none'}"
        if _splits_heads(config, parallel.num_ranks):
            reason = f"leaves a rank without a part of the {config.vocab_size} rows of the "
            reason += "model's vocabulary or of its features"
        else:
            reason = f"does not divide the model's {config.num_heads} query heads and "
            reason += f"{config.num_kv_heads} KV heads"
        raise ConfigurationError(f"{where}: {ranks} {reason}; {valid}")


def _listed(nums: list[int]) -> str:
    return ", ".join(str(num) for num in nums)
