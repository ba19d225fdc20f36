"""Tokens of two workers, in any order, as often as they like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError
from baton.logprobs import TokenLogprobs
from router.token_merge import TokenMerge


@given(data=st.data(), num_tokens=st.integers(0, 20))
def test_any_order_with_any_repeats_gives_each_token_once_in_order(
    data: st.DataObject, num_tokens: int
) -> None:
    answer = [1000 + position for position in range(num_tokens)]
    told = [TokenLogprobs(-float(position)) for position in range(num_tokens)]
    repeats = st.integers(0, max(0, num_tokens - 1))
    extra = data.draw(st.lists(repeats, max_size=20)) if num_tokens else []
    arrivals = data.draw(st.permutations([*range(num_tokens), *extra]))
    merge = TokenMerge(num_tokens)
    taken: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for position in arrivals:
        merge.add(position, answer[position], told[position])
        if data.draw(st.booleans()):
            more, their_logprobs = merge.take()
            taken += more
            logprobs += their_logprobs
        assert taken == answer[: len(taken)]
        assert logprobs == told[: len(taken)]
        assert merge.token_ids == answer[: merge.num_in_order]
    more, their_logprobs = merge.take()
    assert [*taken, *more] == answer
    assert [*logprobs, *their_logprobs] == told
    assert merge.take() == ((), ())


def test_token_that_waits_is_forgotten_with_its_attempt() -> None:
    merge = TokenMerge(8)
    merge.add(0, 10)
    merge.add(2, 12, TokenLogprobs(-2.0))
    merge.forget_ahead()
    merge.add(1, 11, TokenLogprobs(-1.0))
    assert merge.token_ids == [10, 11]
    assert merge.take() == ((10, 11), (TokenLogprobs(-1.0),))


@pytest.mark.parametrize("position", [0, 2])
def test_another_token_at_a_known_position_is_refused(position: int) -> None:
    merge = TokenMerge(8)
    merge.add(0, 10)
    merge.add(2, 12)
    with pytest.raises(InternalError, match=f"position {position}"):
        merge.add(position, 99)


def test_position_at_the_limit_is_refused() -> None:
    merge = TokenMerge(2)
    merge.add(1, 11)
    with pytest.raises(InternalError, match="limit of 2"):
        merge.add(2, 12)
