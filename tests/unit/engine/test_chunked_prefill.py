"""How inputs share a step: nobody starves, and short ones do not wait for long ones."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st
from support.sequences import pretend_step, sequence, small_cache

from engine import chunked_prefill
from engine.sequence import Scheduled, Sequence

BUDGETS = st.integers(1, 40)
LENGTHS = st.lists(st.integers(1, 100), max_size=12)
KV = small_cache(1)
"""Has no room: nothing is found in it, only hashes are made with it."""


def prefill_chunks(sequences: list[Sequence], budget: int) -> list[Scheduled]:
    return chunked_prefill.prefill_chunks(sequences, budget, KV)


def inputs(lengths: list[int], tokens: count[int] | None = None) -> list[Sequence]:
    """Sequences that have nothing in common."""
    tokens = tokens or count()
    return [sequence(number, [next(tokens)] * length) for number, length in enumerate(lengths)]


def compute(chunks: list[Scheduled]) -> None:
    for chunk in chunks:
        chunk.seq.num_computed_tokens += chunk.num_tokens


def given_to(chunks: list[Scheduled]) -> dict[object, int]:
    return {chunk.seq.key: chunk.num_tokens for chunk in chunks}


@given(lengths=LENGTHS, budget=BUDGETS)
def test_a_step_is_full_or_all_is_computed_and_the_oldest_has_its_half(
    lengths: list[int], budget: int
) -> None:
    sequences = inputs(lengths)
    chunks = prefill_chunks(sequences, budget)
    shares = given_to(chunks)
    if len(lengths) != 1:
        assert sum(shares.values()) == min(budget, sum(lengths))
    assert list(shares) == sorted(shares), "not in order of age"
    assert all(0 < share <= lengths[number] for number, share in shares.items())
    if lengths:
        assert shares[0] >= min(lengths[0], -(-budget // 2))
    assert given_to(prefill_chunks(sequences, budget)) == shares


@given(length=st.integers(1, 300), budget=BUDGETS)
def test_an_input_alone_is_computed_in_as_few_and_even_steps(length: int, budget: int) -> None:
    (alone,) = inputs([length])
    shares = []
    while alone.num_computed_tokens < length:
        (chunk,) = prefill_chunks([alone], budget)
        compute([chunk])
        shares.append(chunk.num_tokens)
    assert len(shares) == -(-length // budget)
    assert max(shares) <= budget
    assert max(shares) - min(shares) < 4 * len(shares), "blocks have 4 tokens"


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    later=st.lists(st.lists(st.integers(1, 20), max_size=3), max_size=30),
    budget=BUDGETS,
)
def test_an_input_is_slowed_at_most_twofold_however_many_come_after_it(
    lengths: list[int], later: list[list[int]], budget: int
) -> None:
    tokens = count()
    sequences = inputs(lengths, tokens)
    half = -(-budget // 2)
    bounds = {number: -(-sum(lengths[: number + 1]) // half) for number in range(len(lengths))}
    running = list(sequences)
    for step in range(1, 1 + max(bounds.values())):
        compute(prefill_chunks(running, budget))
        running = [one for one in running if one.num_remaining]
        late = [number for number, bound in bounds.items() if step >= bound]
        assert not any(sequences[number].num_remaining for number in late)
        if step <= len(later):
            running += inputs(later[step - 1], tokens)


@given(lengths=LENGTHS, short=st.integers(1, 20), budget=BUDGETS)
def test_a_short_input_behind_longer_ones_is_computed_in_one_step(
    lengths: list[int], short: int, budget: int
) -> None:
    short = min(short, max(1, budget // 2))
    longer = [length + short for length in lengths]
    chunks = prefill_chunks(inputs([*longer, short]), budget)
    if budget > 1 or not longer:
        assert given_to(chunks)[len(longer)] == short


def test_alike_inputs_are_computed_one_after_the_other() -> None:
    assert given_to(prefill_chunks(inputs([30, 30, 30]), 10)) == {0: 10}


def test_what_the_short_ones_leave_goes_to_the_oldest_before_its_equals() -> None:
    assert given_to(prefill_chunks(inputs([30, 30, 2]), 10)) == {0: 8, 2: 2}


def test_several_short_ones_go_by_length_and_then_by_age() -> None:
    assert given_to(prefill_chunks(inputs([50, 4, 3, 4]), 16)) == {0: 8, 1: 4, 2: 3, 3: 1}


def test_who_has_begun_a_block_goes_on_with_it_for_one_that_ranks_before_it() -> None:
    """And with the share of the step that the other has by its rank."""
    begun, better = sequence(0, list(range(40))), sequence(1, list(range(40)))
    begun.num_computed_tokens = 2  # of a block of four
    between = sequence(2, [90] * 40)
    assert given_to(prefill_chunks([better, between, begun], 8)) == {0: 8}


def test_what_inputs_have_in_common_is_computed_by_the_first_of_them() -> None:
    document = list(range(100, 116))
    sequences = [sequence(0, [0] * 40), *(sequence(n, [*document, n]) for n in (1, 2, 3))]
    # What the short ones get by their length goes to the one that computes for them all.
    assert given_to(prefill_chunks(sequences, 20)) == {0: 10, 1: 10}


def test_a_short_input_is_not_held_up_by_a_long_one_that_begins_alike() -> None:
    """Its share of the step goes to the long one, which computes the same."""
    kv = small_cache(200)
    first, long = sequence(0, [0] * 200), sequence(1, list(range(1000, 1200)))
    short = sequence(2, [*range(1000, 1012), 7])
    for each in (first, long, short):
        assert kv.ensure_blocks(each, each.num_tokens)
    shares = []
    for _ in range(3):
        kv.extend_prefix(short)
        chunks = chunked_prefill.prefill_chunks([first, long, short], 16, kv)
        shares.append(given_to(chunks))
        pretend_step(kv, chunks, 7)
    assert shares == [{0: 8, 1: 8}, {0: 11, 1: 5}, {0: 15, 2: 1}]
