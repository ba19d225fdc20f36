"""What caches could have saved at best, computed from the token ids of what was asked.

A request fills the full blocks of its prompt and answer, the last token of the answer
excepted: nobody computes its KV. A later request can reuse them as far as its prompt has
the same tokens from the beginning on; one token of a prompt is always computed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from baton.block_hash import HashDomain

_DOMAIN = HashDomain(key=b"o" * 32, weights_revision="oracle", kv_dtype="any")
_ROOT = _DOMAIN.root()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it was sent and answered."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Blocks:
    prompt: list[bytes]
    filled: list[bytes]
    """By prompt and answer."""
    num_prompt_tokens: int


def _blocks(request: Asked, block_size: int) -> _Blocks:
    computed = [*request.prompt, *request.answer][: len(request.prompt) + len(request.answer) - 1]
    filled = _DOMAIN.chain(_ROOT, computed, block_size)
    # A prompt that ends with a block has that block filled too, even without an answer.
    prompt = _DOMAIN.chain(_ROOT, request.prompt, block_size)
    return _Blocks(prompt, filled if len(filled) > len(prompt) else prompt, len(request.prompt))


def working_set(requests: Sequence[Asked], block_size: int) -> int:
    """Distinct blocks that the requests ever fill."""
    return len({name for each in requests for name in _blocks(each, block_size).filled})


def infinite_cache(requests: Sequence[Asked], block_size: int) -> int:
    """Prompt tokens that one endless cache would have had, in the order of sending.

    A request's blocks count as there for every request that was sent after it, even if
    it was still being answered: no real cache can have more.
    """
    held: set[bytes] = set()
    num_cached = 0
    for blocks in (_blocks(request, block_size) for request in requests):
        num_leading = 0
        while num_leading < len(blocks.prompt) and blocks.prompt[num_leading] in held:
            num_leading += 1
        num_cached += min(num_leading * block_size, blocks.num_prompt_tokens - 1)
        held.update(blocks.filled)
    return num_cached


def optimal_replacement(requests: Sequence[Asked], block_size: int, num_blocks: int) -> int:
    """An upper bound on the tokens that one cache of that many blocks can have.

    Belady's rule: what is needed again last is given up first, and need not be kept at
    all (L. A. Belady, 1966). Blocks count one by one, as if none needed those before it.
    """
    all_blocks = [_blocks(request, block_size) for request in requests]
    next_use: list[dict[bytes, float]] = []
    seen: dict[bytes, float] = {}
    for number in range(len(all_blocks) - 1, -1, -1):
        filled, prompt = all_blocks[number].filled, all_blocks[number].prompt
        next_use.append({name: seen.get(name, math.inf) for name in filled})
        seen.update(dict.fromkeys(prompt, float(number)))
    next_use.reverse()
    held: dict[bytes, float] = {}
    latest: list[tuple[float, bytes]] = []
    num_cached = 0
    for number, blocks in enumerate(all_blocks):
        num_held = sum(name in held for name in blocks.prompt)
        num_cached += min(num_held * block_size, blocks.num_prompt_tokens - 1)
        for name in blocks.filled:
            used_at = next_use[number][name]
            held[name] = used_at
            heapq.heappush(latest, (-used_at, name))
        while len(held) > num_blocks:
            used_at, name = heapq.heappop(latest)
            if held.get(name) == -used_at:
                del held[name]
    return num_cached
