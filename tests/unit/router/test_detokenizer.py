"""Incremental text equals the whole decoding, and no piece ends inside a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_gateway import ids_of, real_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models

from router.tokenization.detokenizer import Detokenizers


def pieces(detokenizers: Detokenizers, ids: list[int]) -> list[str]:
    detokenizer = detokenizers.new()
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def real() -> Detokenizers:
    return Detokenizers(real_tokenizer())


def sentencepiece_like() -> Tokenizer:
    """Words with a space mark, bytes as tokens of their own, as Llama 2 has them."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁Hello", "▁world", "ing", "!", "�", "é", "▁▁"]
    vocab = {word: index for index, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = [AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


_SPM = sentencepiece_like()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49_300), max_size=40))
def test_joined_pieces_equal_the_whole_decoding_of_any_ids(ids) -> None:
    # Ids past the vocabulary too: a model's logits may be wider than its tokenizer.
    joined = "".join(pieces(Detokenizers(real_tokenizer()), ids))
    assert joined == real_tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ids_of("½é漢🎉🏳️‍🌈") + ids_of("a b")), max_size=30))
def test_joined_pieces_equal_the_whole_decoding_of_broken_characters(ids) -> None:
    joined = "".join(pieces(Detokenizers(real_tokenizer()), ids))
    assert joined == real_tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 10), st.integers(0, 270)), max_size=30))
def test_sentencepiece_pieces_equal_the_whole_decoding_of_any_ids(ids) -> None:
    joined = "".join(pieces(Detokenizers(_SPM), ids))
    assert joined == _SPM.decode(ids, skip_special_tokens=True)


@given(st.text("ab é½漢🎉🦕\u2028\x85\n", max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_piece_ends_inside_a_character(text) -> None:
    shown = pieces(Detokenizers(real_tokenizer()), ids_of(text))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_character_of_several_tokens_is_shown_when_complete(real: Detokenizers) -> None:
    ids = ids_of("🦕")
    assert len(ids) > 1
    assert pieces(real, ids) == [*[""] * (len(ids) - 1), "🦕", ""]


def test_character_that_never_completes_is_replaced_at_the_end(real: Detokenizers) -> None:
    assert pieces(real, ids_of("ok🦕")[:-1])[-1] == "\ufffd"


def test_special_tokens_are_not_rendered(real: Detokenizers) -> None:
    assert "".join(pieces(real, [*ids_of("a"), 2, 1, *ids_of("b")])) == "ab"


def test_sentencepiece_first_space_is_stripped_and_later_ones_kept() -> None:
    hello, world = _SPM.token_to_id("▁Hello"), _SPM.token_to_id("▁world")
    assert pieces(Detokenizers(_SPM), [1, hello, world, 2]) == ["", "Hello", " world", "", ""]


def test_sentencepiece_bytes_of_a_character_are_shown_together() -> None:
    ids = [_SPM.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    shown = pieces(Detokenizers(_SPM), [*ids, _SPM.token_to_id("!")])
    assert shown == ["", "", "é!", ""]
