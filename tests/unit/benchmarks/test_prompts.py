"""The texts of the load: the same again, never alike, as long as they are said to be."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import open_checkpoint
from baton.config import DEFAULT_MODEL
from benchmarks import prompts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The default model's."""
    return Tokenizer.from_file(str(open_checkpoint(DEFAULT_MODEL).folder / "tokenizer.json"))


def test_every_word_is_one_token(tokenizer: Tokenizer) -> None:
    lengths = {word: len(tokenizer.encode(" " + word).ids) for word in prompts.WORDS}
    assert {word for word, length in lengths.items() if length != 1} == set()
    assert len(set(prompts.WORDS)) == len(prompts.WORDS)


@pytest.mark.parametrize("num_tokens", [1, 2, 12, 300, 1500])
def test_a_document_is_as_long_as_asked_for(tokenizer: Tokenizer, num_tokens: int) -> None:
    length = len(tokenizer.encode(prompts.document(prompts.rng(3), num_tokens)).ids)
    assert abs(length - num_tokens) <= 2


def test_texts_are_a_function_of_the_seed() -> None:
    first, again, other = (
        [make(prompts.rng(seed, "x")) for make in (prompts.opening, prompts.follow_up)]
        + [prompts.document_opening(prompts.rng(seed, "y"), 50)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_documents_differ_from_their_first_words_on() -> None:
    beginnings = {prompts.document(prompts.rng(0, i), 100)[:60] for i in range(200)}
    assert len(beginnings) == 200
