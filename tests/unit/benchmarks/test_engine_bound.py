"""The bound multiplies as many rows at once as the engine does."""

from __future__ import annotations

import pytest

from benchmarks.engine.bound import CHUNK, chunks_of


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1030, [352, 352, 326]), (512, [512]), (513, [272, 241]), (7, [7])],
)
def test_a_prompt_is_cut_as_the_engine_cuts_it(num_tokens: int, expected: list[int]) -> None:
    assert chunks_of(num_tokens, CHUNK) == expected
