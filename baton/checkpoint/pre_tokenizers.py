"""How text is split before byte-level BPE, by the word that GGUF files have for it.

The patterns are those of the models' own tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """``ignores_merges``: a word that is in the vocabulary is one token, whatever merges say."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    normalizer: normalizers.Normalizer | None = None
    ignores_merges: bool = False


def _split(digits: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Words with what precedes them, numbers in groups of ``digits``, punctuation, spaces."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return (
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


_LLAMA3 = PreTokenizer(_split(r"\p{N}{1,3}"), ignores_merges=True)
_QWEN2 = PreTokenizer(_split(r"\p{N}"), normalizer=normalizers.NFC())
# Every digit alone, then GPT-2's split into words.
_SMOLLM = PreTokenizer(
    (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    )
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
