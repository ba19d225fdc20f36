"""How far each input is computed in a step: chunks of it, within the step's token budget.

Half of the budget goes in order of age. So no input starves: however many others come,
it is slowed at most twofold. The other half goes to the inputs that are nearest to their
end, so a short prompt is computed in the step after it arrives, though long ones came
before. Alike inputs are computed one after the other, as first come, first served has it.

What several inputs have in common is computed once: those that would compute the same
block next wait for the oldest of them, and what they would get goes to it.

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
    that of their age, the oldest first. Sequences that get nothing are left out.

    The caller has called ``kv.extend_prefix`` for every one: who waits takes the block
    there, once it is computed.
    """
    by_age = range(len(sequences))
    by_length = sorted(by_age, key=lambda index: sequences[index].num_remaining)
    num_left = [sequence.num_remaining for sequence in sequences]
    num_given = [0] * len(sequences)
    leaders = _leaders(sequences, kv)

    def give(indices: Iterable[int], num_tokens: int) -> int:
        for index in indices:
            leader = leaders[index]
            share = min(num_left[index], num_left[leader], num_tokens)
            num_left[leader] -= share
            num_given[leader] += share
            num_tokens -= share
        return num_tokens

    reserved = (budget + 1) // 2
    rest = budget - reserved + give(by_age, reserved)
    give(by_length, rest)
    return [
        Scheduled(sequence, given)
        for sequence, given in zip(sequences, num_given, strict=True)
        if given
    ]


def _leaders(sequences: SequenceOf[Sequence], kv: KvCache) -> list[int]:
    """Index of who computes the next block of each: itself, or an older sequence that is
    at the same block."""
    oldest: dict[bytes, int] = {}
    leaders: list[int] = []
    for index, sequence in enumerate(sequences):
        block_hash = kv.next_block_hash(sequence)
        leaders.append(index if block_hash is None else oldest.setdefault(block_hash, index))
    return leaders
