"""Tokens of two workers, in any order, as often as they like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError
from baton.logprobs import TokenLogprobs
from router.request import Arrival
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

    def take() -> None:
        token_ids, came, told_with_them = merge.take()
        assert sum(arrival.num_tokens for arrival in came) == len(token_ids)
        taken.extend(token_ids)
        logprobs.extend(told_with_them)

    for number, position in enumerate(arrivals):
        merge.add(position, answer[position], float(number), told[position])
        if data.draw(st.booleans()):
            take()
        assert taken == answer[: len(taken)]
        assert logprobs == told[: len(taken)]
        assert merge.token_ids == answer[: merge.num_in_order]
    take()
    assert taken == answer
    assert logprobs == told
    assert merge.take() == ((), (), ())


def test_tokens_have_the_time_at_which_they_could_be_had() -> None:
    merge = TokenMerge(8)
    merge.add(0, 10, at=1.0)
    merge.add(1, 11, at=1.0)
    merge.add(3, 13, at=2.0)
    merge.add(1, 11, at=3.0)
    merge.add(2, 12, at=4.0)
    assert merge.take() == ((10, 11, 12, 13), (Arrival(1.0, 2), Arrival(4.0, 2)), ())
    merge.add(4, 14, at=4.0)
    assert merge.take() == ((14,), (Arrival(4.0, 1),), ())


def test_token_that_waits_is_forgotten_with_its_attempt() -> None:
    merge = TokenMerge(8)
    merge.add(0, 10, at=0.0)
    merge.add(2, 12, 0.0, TokenLogprobs(-2.0))
    merge.forget_ahead()
    merge.add(1, 11, 0.0, TokenLogprobs(-1.0))
    assert merge.token_ids == [10, 11]
    assert merge.take()[2] == (TokenLogprobs(-1.0),)


@pytest.mark.parametrize("position", [0, 2])
def test_another_token_at_a_known_position_is_refused(position: int) -> None:
    merge = TokenMerge(8)
    merge.add(0, 10, at=0.0)
    merge.add(2, 12, at=0.0)
    with pytest.raises(InternalError, match=f"position {position}"):
        merge.add(position, 99, at=0.0)


def test_position_at_the_limit_is_refused() -> None:
    merge = TokenMerge(2)
    merge.add(1, 11, at=0.0)
    with pytest.raises(InternalError, match="limit of 2"):
        merge.add(2, 12, at=0.0)
