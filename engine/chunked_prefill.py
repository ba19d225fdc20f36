"""How far each input is computed in a step: chunks of it, within the step's token budget.

Half of the budget goes in the order of rank: by priority and, among equals, by age. So no
input is slowed more than twofold by what ranks behind it, however much of that comes; with
equal priorities none starves. The other half goes to the inputs that are nearest to their
end, so a short prompt is computed in the step after it arrives, though long ones rank before
it. Alike inputs are computed one after the other, as first come, first served has it.

An input that is alone is computed in even steps, as few as the budget allows: 1,030 tokens in
steps of at most 512 are 352, 352 and 326, not 512, 512 and 6, since six take as long as forty.

What several inputs have in common is computed once: those that would compute the same
block next wait for one of them, and what they would get goes to it.

Chunks: Sarathi-Serve, https://arxiv.org/abs/2403.02310. Their order is shortest remaining
processing time first (Schrage, 1968), which has the least mean waiting time, beside a
share that is reserved for age.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.kv_cache.kv_cache import KvCache
from engine.sequence import Scheduled, Sequence


def prefill_chunks(sequences: SequenceOf[Sequence], budget: int, kv: KvCache) -> list[Scheduled]:
    """Chunks of at most ``budget`` tokens together, in the order of ``sequences``, which is
    that of their rank: the best priority first, and the oldest among equals. Sequences that
    get nothing are left out.

    The caller has called ``kv.extend_prefix`` for every one: who waits takes the block
    there, once it is computed.
    """
    by_rank = range(len(sequences))
    by_length = sorted(by_rank, key=lambda index: sequences[index].num_remaining)
    num_left = [sequence.num_remaining for sequence in sequences]
    num_given = [0] * len(sequences)
    leaders = _leaders(sequences, kv)

    def give(indices: Iterable[int], num_tokens: int) -> int:
        for index in indices:
            leader = leaders[index]
            given = min(num_left[index], num_left[leader], num_tokens)
            num_left[leader] -= given
            num_given[leader] += given
            num_tokens -= given
        return num_tokens

    if len(sequences) == 1:
        budget = even_share(num_left[0], budget, kv.layout.block_size)
    reserved = (budget + 1) // 2
    rest = budget - reserved + give(by_rank, reserved)
    give(by_length, rest)
    return [
        Scheduled(sequence, given)
        for sequence, given in zip(sequences, num_given, strict=True)
        if given
    ]


def even_share(num_tokens: int, budget: int, block_size: int) -> int:
    """How many of an input's remaining tokens a step computes where the input is alone: in whole
    blocks where they fit, at least half of the budget if more is left."""
    num_steps = max(1, -(-num_tokens // max(1, budget)))
    num_blocks = -(-num_tokens // (num_steps * block_size))
    return min(budget, num_tokens, num_blocks * block_size)


def _leaders(sequences: SequenceOf[Sequence], kv: KvCache) -> list[int]:
    """Index of who computes the next block of each: of those that are at the same block who
    has begun it, else the first."""
    block_hashes = [kv.next_block_hash(sequence) for sequence in sequences]
    leader_of: dict[bytes, int] = {}
    for index, block_hash in enumerate(block_hashes):
        if block_hash is not None:
            leader = leader_of.setdefault(block_hash, index)
            if sequences[index].num_computed_tokens > sequences[leader].num_computed_tokens:
                leader_of[block_hash] = index
    return [
        index if block_hash is None else leader_of[block_hash]
        for index, block_hash in enumerate(block_hashes)
    ]
