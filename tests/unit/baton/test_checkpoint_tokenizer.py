"""The tokenizer made from the default model's GGUF file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from baton.checkpoint.checkpoint import Checkpoint, open_checkpoint
from baton.config import DEFAULT_MODEL

STRINGS = [
    "",
    "a",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "What is the capital of France?",
    "don't can't I'll we've THEY'RE",
    "two  spaces, three   spaces,\ttab,\t\ttabs",
    "\n",
    "\r\n\r\n",
    "line one\nline two\n\n\nline three   \n    indented",
    "0",
    "1234567890",
    "3.14159 and 1,000,000 and -42e10",
    "2024-01-31T23:59:59Z",
    "²³½ ⅷ ٣٤٥ १२३ 〇一二",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }",
    '{"key": ["value", null, true, 1.5e-3]}',
    "<html><body class='x'>&nbsp;</body></html>",
    "SELECT * FROM t WHERE a != 'b' -- c",
    r"\frac{a}{b} \\ C:\path\to",
    "https://example.org/a?b=c&d=%20#e",
    "ünïcödé café naïve Straße",
    "Zażółć gęślą jaźń",
    "Привет, как дела?",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好,世界。今天天气很好",
    "こんにちは世界、カタカナ",
    "안녕하세요 세계",
    "😀 🎉🎉 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "e\u0301 versus \u00e9, \u200b zero width, \u00a0 no-break, \ufeff mark",
    "∀x∈ℝ: ⌈x⌉ ≥ x — “quotes” … €£¥",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <|im_nothing|> <|",
    "<repo_name>a/b<file_sep>c<jupyter_code>d",
    "antidisestablishmentarianism " * 3,
]

# Bytes that the vocabulary of this model lacks, as U+0004, 06, 13, 14, 16, 1D, and the first
# bytes of planes that hold no characters. Its own tokenizer drops them.
DROPPED = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_checkpoint(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(checkpoint.folder)


def test_the_default_model_is_described(checkpoint: Checkpoint) -> None:
    assert checkpoint.name == DEFAULT_MODEL
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.rms_norm_eps, config.max_position) == (1e5, 1e-5, 8192)
    assert config.tie_word_embeddings
    assert checkpoint.eos_token_ids == (2,)


@pytest.mark.parametrize("text", STRINGS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(deadline=None)
@given(st.text().filter(lambda text: DROPPED.isdisjoint(text.encode())))
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_known_texts_have_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is Paris.").ids == [
        504,
        3575,
        282,
        4649,
        314,
        7042,
        30,
    ]
    assert tokenizer.encode("12 ²³").tokens == ["1", "2", "Ġ", "Â²", "Â³"]
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]


def test_special_tokens_keep_the_ids_of_the_file(tokenizer: Tokenizer) -> None:
    special = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    assert sorted(special) == list(range(17))
    assert [special[i] for i in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.get_vocab_size() == 49152


@pytest.mark.parametrize("text", STRINGS)
def test_transformers_reads_the_same_tokenizer(
    tokenizer: Tokenizer, oracle: Any, text: str
) -> None:
    ids = tokenizer.encode(text).ids
    assert oracle(text)["input_ids"] == ids
    assert oracle.decode(ids) == text


def test_transformers_renders_the_same_chat(
    checkpoint: Checkpoint, tokenizer: Tokenizer, oracle: Any
) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert checkpoint.chat_template is not None
    template = jinja2.Environment().from_string(checkpoint.chat_template)
    text = template.render(messages=messages, add_generation_prompt=True)
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode(text).ids == expected
    assert expected[0] == oracle.bos_token_id == 1
