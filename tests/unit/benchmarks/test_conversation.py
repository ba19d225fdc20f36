"""A history that grows by turns, and never over its context."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.conversation import Conversation


def test_every_turn_sends_all_that_was_said() -> None:
    talk = Conversation(context=1000, answer_tokens=50)
    assert talk.ask("first?")
    talk.answered("one", num_prompt_tokens=40, num_tokens=10)
    assert talk.ask("second?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant", "user"]
    assert talk.messages[1]["content"] == "one"
    assert talk.num_turns == 1


def test_a_question_that_might_not_fit_is_not_asked() -> None:
    talk = Conversation(context=200, answer_tokens=50)
    assert talk.ask("x" * 90)
    talk.answered("y", num_prompt_tokens=100, num_tokens=50)
    assert not talk.ask("again?")
    assert len(talk.messages) == 2


def test_the_servers_count_replaces_the_estimate() -> None:
    talk = Conversation(context=400, answer_tokens=50)
    assert talk.ask("x" * 600)  # 200 tokens by the estimate
    talk.answered("y", num_prompt_tokens=60, num_tokens=10)
    assert talk.ask("x" * 600)


def test_a_known_length_is_not_estimated() -> None:
    assert Conversation(context=1000, answer_tokens=50).ask("x" * 6000, 800)
    assert not Conversation(context=1000, answer_tokens=50).ask("x" * 6000)


@given(
    context=st.integers(100, 3000),
    answer=st.integers(1, 200),
    questions=st.lists(st.integers(1, 900), max_size=20),
)
def test_prompt_and_answer_fit_where_a_token_has_three_characters(
    context: int, answer: int, questions: list[int]
) -> None:
    talk = Conversation(context=context, answer_tokens=answer)
    for length in questions:
        if not talk.ask("q" * length):
            break
        prompt = sum(-(-len(message["content"]) // 3) + 10 for message in talk.messages)
        assert prompt + answer <= context
        talk.answered("a" * 3 * answer, num_prompt_tokens=None, num_tokens=answer)
