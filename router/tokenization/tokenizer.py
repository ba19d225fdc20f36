"""Prompts to token ids, with the checkpoint's own tokenizer and chat template.

Work that takes long goes to a thread, at most two at a time, so that neither
the event loop nor the machine is taken by one client's giant prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders

from baton.checkpoint.checkpoint import Checkpoint
from baton.errors import ContextLengthError, UnsupportedError
from router.tokenization.chat_template import ChatTemplate
from router.tokenization.detokenizer import Detokenizer, Detokenizers
from router.tokenization.token_text import TokenTexts

_INLINE_CHARACTERS = 10_000
"""Tokenized on the event loop (some 2 ms); longer ones in a thread."""

_THREADS = 2

T = TypeVar("T")


class PromptTokenizer:
    """All that the gateway does with one checkpoint's tokenizer, both directions."""

    def __init__(self, tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
        """Takes the tokenizer over: its truncation and padding are switched off.

        Raises CheckpointError for a chat template that does not compile.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self._detokenizers = Detokenizers(tokenizer)
        # What it puts before every text, if that is one token.
        added = tokenizer.encode("", add_special_tokens=True).ids
        self._bos_id = added[0] if len(added) == 1 else None
        self._bytes_per_token = _longest_token_bytes(tokenizer)
        self._threads = asyncio.Semaphore(_THREADS)
        self._template = (
            ChatTemplate(
                checkpoint.chat_template,
                bos_token=checkpoint.bos_token,
                eos_token=checkpoint.eos_token,
            )
            if checkpoint.chat_template is not None
            else None
        )

    def new_detokenizer(self) -> Detokenizer:
        return self._detokenizers.new()

    async def encode_texts(
        self, texts: Sequence[str], *, max_tokens: int, param: str
    ) -> list[list[int]]:
        """Token ids of each text, the beginning-of-sequence token once if the tokenizer adds it.

        Raises ContextLengthError naming ``param`` for a text that cannot have
        ``max_tokens`` tokens or fewer; one that is merely too long is returned.
        """
        for text in texts:
            self._refuse_hopeless(text, max_tokens=max_tokens, param=param)
        num_characters = sum(map(len, texts))
        return await self._run(num_characters, lambda: [self._encode(text) for text in texts])

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int
    ) -> list[int]:
        """Token ids of the conversation. The template writes its own special tokens.

        Raises InvalidRequestError or ContextLengthError, naming ``messages``.
        """
        template = self._template
        if template is None:
            raise UnsupportedError(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        num_characters = sum(len(message["content"]) for message in messages)

        def encode() -> list[int]:
            prompt = template.render(messages)
            self._refuse_hopeless(prompt, max_tokens=max_tokens, param="messages")
            return self._ids(prompt, add_special_tokens=False)

        return await self._run(num_characters, encode)

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(text, add_special_tokens=True)
        # The text itself may begin with the token that the tokenizer puts before it.
        doubled = self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]
        return ids[1:] if doubled else ids

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # encode() keeps the interpreter's lock; the batch call, given one text, lets it go.
        if len(text) > _INLINE_CHARACTERS:
            batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    async def _run(self, num_characters: int, work: Callable[[], T]) -> T:
        if num_characters <= _INLINE_CHARACTERS:
            return work()
        async with self._threads:
            return await asyncio.to_thread(work)

    def _refuse_hopeless(self, text: str, *, max_tokens: int, param: str) -> None:
        """Refuses by its size a text that tokenizing could only confirm to be too long."""
        longest = self._bytes_per_token
        if longest is None or len(text) <= max_tokens * longest:
            return
        num_tokens = -(-len(text) // longest)
        raise ContextLengthError(
            f"the prompt has {len(text)} characters, which is at least {num_tokens} tokens; "
            f"prompt and answer together may have {max_tokens}",
            param=param,
        )


def _longest_token_bytes(tokenizer: Tokenizer) -> int | None:
    """Most bytes of text that one token can stand for; None where that has no bound.

    Known for ByteLevel vocabularies without a normalizer, where each character
    of a token is one byte, unless an added token swallows the space around it.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    bounded = isinstance(tokenizer.decoder, decoders.ByteLevel) and tokenizer.normalizer is None
    if not bounded or any(token.lstrip or token.rstrip for token in added):
        return None
    return max(len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True))
