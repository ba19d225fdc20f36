"""What caches could have saved at best."""

from __future__ import annotations

import pytest

from benchmarks.routing.oracle import Asked, infinite_cache, optimal_replacement, working_set

SIZE = 4
A, B = list(range(100, 108)), list(range(200, 208))  # two blocks each


def test_an_answer_is_reusable_but_for_its_last_token() -> None:
    first = Asked(A, [1, 2, 3, 4])  # 12 tokens, of which the last has no KV
    again = Asked([*A, 1, 2, 3, 4, 5], [9])
    assert infinite_cache([first, again], SIZE) == 8
    longer = Asked(A, [1, 2, 3, 4, 5])
    assert infinite_cache([longer, again], SIZE) == 12


def test_one_token_of_a_prompt_is_always_computed() -> None:
    assert infinite_cache([Asked(A, [1]), Asked(A, [1])], SIZE) == len(A) - 1


def test_only_a_common_beginning_is_reused() -> None:
    assert infinite_cache([Asked(A, [1]), Asked([0, *A[1:]], [1])], SIZE) == 0
    assert infinite_cache([Asked(A, [1]), Asked([*A[:5], 0, 0, 0], [1])], SIZE) == SIZE


def test_the_working_set_counts_a_shared_block_once() -> None:
    assert working_set([Asked([*A, 1, 2, 3, 4], [0]), Asked([*A, 5, 6, 7, 8], [0])], SIZE) == 4


@pytest.mark.parametrize(("num_blocks", "expected"), [(0, 0), (2, 7), (4, 14), (99, 14)])
def test_optimal_replacement_keeps_what_is_needed_first(num_blocks: int, expected: int) -> None:
    requests = [Asked(prompt, [1]) for prompt in (A, B, B, A)]
    assert optimal_replacement(requests, SIZE, num_blocks) == expected
