"""Prompts to token ids: special tokens once, long work off the loop, giants refused by size."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from support.fake_gateway import ids_of, real_checkpoint, real_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from baton.errors import ContextLengthError, UnsupportedError
from router.tokenization.tokenizer import PromptTokenizer

LIMIT = 8192


def fresh_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(real_tokenizer().to_str())


@pytest.fixture(scope="module")
def bos_tokenizer() -> PromptTokenizer:
    """The real vocabulary, with a beginning-of-sequence token put before every text."""
    tokenizer = fresh_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return PromptTokenizer(tokenizer, real_checkpoint())


async def encode(tokenizer: PromptTokenizer, *texts: str) -> list[list[int]]:
    return await tokenizer.encode_texts(texts, max_tokens=LIMIT, param="prompt")


async def test_text_gets_the_special_token_that_the_tokenizer_adds(bos_tokenizer) -> None:
    assert await encode(bos_tokenizer, "Hi") == [[1, *ids_of("Hi")]]


async def test_text_that_begins_with_it_does_not_get_it_twice(bos_tokenizer) -> None:
    assert await encode(bos_tokenizer, "<|im_start|>Hi") == [[1, *ids_of("Hi")]]


async def test_chat_gets_none_but_the_templates_own(bos_tokenizer) -> None:
    ids = await bos_tokenizer.encode_chat([{"role": "user", "content": "Hi"}], max_tokens=LIMIT)
    assert ids[:2] == [1, *ids_of("system")]


async def test_tokenizer_that_adds_none_leaves_doubled_tokens_alone() -> None:
    tokenizer = PromptTokenizer(real_tokenizer(), real_checkpoint())
    assert await encode(tokenizer, "<|im_start|><|im_start|>x") == [[1, 1, *ids_of("x")]]


async def test_truncation_and_padding_of_the_file_are_off() -> None:
    tokenizer = fresh_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    ids = await encode(PromptTokenizer(tokenizer, real_checkpoint()), "one two three four five six")
    assert ids == [ids_of("one two three four five six")]


async def test_long_text_is_encoded_in_a_thread_and_equal(monkeypatch) -> None:
    tokenizer = PromptTokenizer(real_tokenizer(), real_checkpoint())
    threads = []
    inner = tokenizer._ids

    def spy(text: str, *, add_special_tokens: bool) -> list[int]:
        threads.append(threading.current_thread())
        return inner(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "_ids", spy)
    long = "The quick brown fox. " * 1000
    assert await encode(tokenizer, "short", long) == [ids_of("short"), ids_of(long)]
    await encode(tokenizer, "short")
    loop_thread = threading.main_thread()
    assert [thread is loop_thread for thread in threads] == [False, False, True]


async def test_text_that_no_tokenizing_could_fit_is_refused_by_its_size(monkeypatch) -> None:
    tokenizer = PromptTokenizer(real_tokenizer(), real_checkpoint())
    monkeypatch.setattr(tokenizer, "_ids", None)  # would crash if it were called
    with pytest.raises(ContextLengthError, match="at least") as caught:
        await encode(tokenizer, "x" * 2_000_000)
    assert caught.value.param == "prompt"


async def test_size_refuses_nothing_that_fits() -> None:
    tokenizer = PromptTokenizer(real_tokenizer(), real_checkpoint())
    longest = max((token for token in real_tokenizer().get_vocab() if token.isascii()), key=len)
    text = longest * 50
    num_tokens = len(ids_of(text))
    assert await tokenizer.encode_texts([text], max_tokens=num_tokens, param="prompt") == [
        ids_of(text)
    ]


async def test_model_without_a_template_refuses_chats_only() -> None:
    checkpoint = dataclasses.replace(real_checkpoint(), chat_template=None)
    tokenizer = PromptTokenizer(real_tokenizer(), checkpoint)
    with pytest.raises(UnsupportedError, match="/v1/completions") as caught:
        await tokenizer.encode_chat([{"role": "user", "content": "Hi"}], max_tokens=LIMIT)
    assert caught.value.param == "messages"
    assert await encode(tokenizer, "Hi") == [ids_of("Hi")]
