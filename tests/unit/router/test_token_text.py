"""A token's own text and bytes, for tokenizers of both kinds."""

from __future__ import annotations

import pytest
from support.fake_gateway import ids_of, real_tokenizer

from router.tokenization.token_text import TokenText, TokenTexts
from tests.unit.router.test_detokenizer import sentencepiece_like


@pytest.fixture(scope="module")
def real() -> TokenTexts:
    return TokenTexts(real_tokenizer())


@pytest.mark.parametrize("text", ["Hello, world", "½é漢🎉🏳️‍🌈", "  two\n\ttabs"])
def test_bytes_of_a_texts_tokens_joined_are_the_texts(real: TokenTexts, text: str) -> None:
    assert b"".join(real.of(token_id).data for token_id in ids_of(text)).decode() == text


def test_piece_of_a_character_shows_its_bytes(real: TokenTexts) -> None:
    pieces = [real.of(token_id) for token_id in ids_of(" 🎉")]
    assert len(pieces) > 1
    assert pieces[0] == TokenText(" \\xf0\\x9f", b" \xf0\x9f", is_text=False)


def test_special_tokens_have_their_names(real: TokenTexts) -> None:
    assert real.of(2) == TokenText("<|im_end|>", b"<|im_end|>", is_text=True)


def test_id_without_a_token_is_empty(real: TokenTexts) -> None:
    assert real.of(60_000) == TokenText("", b"", is_text=True)


@pytest.mark.parametrize(
    ("token", "text", "data"),
    [
        ("▁Hello", " Hello", b" Hello"),
        ("ing", "ing", b"ing"),
        ("▁", " ", b" "),
        ("<0xF0>", "\\xf0", b"\xf0"),
        ("<0x41>", "A", b"A"),
        ("</s>", "</s>", b"</s>"),
    ],
)
def test_sentencepiece_tokens_keep_their_space(token: str, text: str, data: bytes) -> None:
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    assert texts.of(tokenizer.token_to_id(token)) == TokenText(text, data, text.encode() == data)
