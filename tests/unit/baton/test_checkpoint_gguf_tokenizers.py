"""Tokenizers that are made from a GGUF file's words, against those of transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import MERGES, vocabulary, write_tiny_gguf
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import open_checkpoint
from baton.errors import CheckpointError

STRINGS = [
    "",
    "Hello, world! THEY'RE don't I'll we've",
    " leading and  two   spaces\t\ttabs \n\nlines\r\n  indented   ",
    "1234567890 3.14 and 1,000,000 ²³½ ⅷ ٣٤٥",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }  // c\n",
    "ünïcödé e\u0301 versus \u00e9 \u00a0 \ufeff",
    "Привет, 你好,世界。안녕 สวัสดี नमस्ते",
    "😀 👨‍👩‍👧 🇫🇷 ∀x∈ℝ — “quotes” …",
    "the then the<|im_end|> in <|im_start|>then",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))


def tokenizer_of(tmp_path: Path, **fields: Any) -> Tokenizer:
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    path = write_tiny_gguf(tmp_path / "m.gguf", fields=fields)
    return Tokenizer.from_file(str(open_checkpoint(str(path)).folder / "tokenizer.json"))


def transformers_tokenizer(**fields: Any) -> Tokenizer:
    """What transformers itself makes of the same metadata."""
    from transformers.integrations.gguf import convert_gguf_tokenizer

    kinds = [3] * 3 + [1] * (len(vocabulary()) - 3)
    byte_level = {
        "tokenizer_type": "gpt2",
        "tokens": vocabulary(),
        "token_type": kinds,
        "merges": [f"{left} {right}" for left, right in MERGES],
    }
    made: Tokenizer = convert_gguf_tokenizer("llama", byte_level | fields)[0]
    return made


def assert_equal_encodings(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in STRINGS:
        splits = [made.pre_tokenizer.pre_tokenize_str(text) for made in (ours, theirs)]
        assert splits[0] == splits[1], text
        found = ours.encode(text, add_special_tokens=False)
        assert found.ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(found.ids) == theirs.decode(found.ids), text


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_splits_as_transformers_does(tmp_path: Path, pre: str) -> None:
    theirs = transformers_tokenizer(pre_tokenizer_type=pre)
    assert_equal_encodings(tokenizer_of(tmp_path, pre=pre), theirs)


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen"])
def test_qwen2_splits_and_normalizes_as_transformers_does(tmp_path: Path, pre: str) -> None:
    from transformers import Qwen2Tokenizer

    vocab = {token: index for index, token in enumerate(vocabulary())}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=MERGES).backend_tokenizer
    theirs.add_special_tokens(list(vocabulary()[:3]))
    ours = tokenizer_of(tmp_path, pre=pre)
    assert_equal_encodings(ours, theirs)
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_every_text_comes_back(tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre)
    for text in STRINGS[1:5]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_word_of_llama3s_vocabulary_is_one_token_without_merges(tmp_path: Path) -> None:
    tokens = [*vocabulary()[:-1], "zq"]  # "Ġthe" is left out with its merge
    merges = [f"{left} {right}" for left, right in MERGES[:-1]]
    ours = tokenizer_of(tmp_path, pre="llama-bpe", tokens=tokens, merges=merges)
    assert ours.encode("zq").ids == [len(tokens) - 1]
    other = tokenizer_of(tmp_path, pre="qwen2", tokens=tokens, merges=merges)
    assert len(other.encode("zq").ids) == 2


PIECES = ["▁", "t", "h", "e", "n", "i", "▁t", "he", "th", "▁th", "▁the", "in", "▁then", "▁▁", "en"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
SPM: dict[str, Any] = {
    "tokens": SPM_TOKENS,
    "scores": [0.0] * 259 + [-float(1 + (7 * i) % 15) for i in range(len(PIECES))],
    "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
}
SPM_FIELDS = {**SPM, "model": "llama", "pre": None, "merges": None, "unknown_token_id": 0}
VOCAB_SIZE = {"llama.vocab_size": len(SPM_TOKENS)}


def sentencepiece_of(tmp_path: Path, **changes: Any) -> Tokenizer:
    fields = {f"tokenizer.ggml.{k}": v for k, v in (SPM_FIELDS | changes).items()}
    path = write_tiny_gguf(tmp_path / "m.gguf", fields=fields | VOCAB_SIZE)
    return Tokenizer.from_file(str(open_checkpoint(str(path)).folder / "tokenizer.json"))


def test_sentencepiece_merges_the_best_score_first(tmp_path: Path) -> None:
    ours = sentencepiece_of(tmp_path)
    scores = dict(zip(SPM_TOKENS, SPM["scores"], strict=True))
    for text in ("the then in", "thethen", "ehtni then  the", "é the 你"):
        expected = _merged("▁" + text.replace(" ", "▁"), scores)
        assert ours.encode(text, add_special_tokens=False).tokens == expected
        assert ours.decode(ours.encode(text).ids) == text


def _merged(text: str, scores: dict[str, float]) -> list[str]:
    """Sentencepiece's own rule: join the neighbours that make the best piece."""
    parts = []
    for character in text:
        known = character in scores
        parts += [character] if known else [f"<0x{byte:02X}>" for byte in character.encode()]
    while True:
        pairs = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not pairs:
            return parts
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_sentencepiece_begins_with_its_first_token_unless_told_not_to(tmp_path: Path) -> None:
    assert sentencepiece_of(tmp_path).encode("the").ids[0] == 1
    assert sentencepiece_of(tmp_path, add_bos_token=False).encode("the").ids[0] != 1


def test_sentencepiece_without_a_prefix(tmp_path: Path) -> None:
    tokenizer = sentencepiece_of(tmp_path, add_space_prefix=False, add_bos_token=False)
    assert tokenizer.encode("in the").tokens == ["in", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" in the").ids) == " in the"


def test_scores_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores has 3 entries"):
        sentencepiece_of(tmp_path, scores=[0.0] * 3)
