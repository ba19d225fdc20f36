"""How far each input is computed in a step: chunks of it, within the step's token budget.

Half of the budget goes in order of age. So no input starves: however many others come,
it is slowed at most twofold. The other half goes to the inputs that are nearest to their
end, so a short prompt is computed in the step after it arrives, though long ones came
before. Alike inputs are computed one after the other, as first come, first served has it.

Chunks: Sarathi-Serve, https://arxiv.org/abs/2403.02310. Their order is shortest remaining
processing time first (Schrage, 1968), which has the least mean waiting time, beside a
share that is reserved for age.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.sequence import Scheduled, Sequence


def prefill_chunks(sequences: SequenceOf[Sequence], budget: int) -> list[Scheduled]:
    """Chunks of at most ``budget`` tokens together, in the order of ``sequences``, which is
    that of their age, the oldest first. Sequences that get nothing are left out."""
    by_age = range(len(sequences))
    by_length = sorted(by_age, key=lambda index: sequences[index].num_remaining)
    num_left = [sequence.num_remaining for sequence in sequences]
    num_given = [0] * len(sequences)

    def give(indices: Iterable[int], num_tokens: int) -> int:
        for index in indices:
            share = min(num_left[index], num_tokens)
            num_left[index] -= share
            num_given[index] += share
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
