"""``/v1/chat/completions``: a conversation in, the assistant's turn out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from router.gateway.choices import Delta
from router.gateway.endpoint import Answer
from router.gateway.logprobs import LoggedToken, chat_logprobs
from router.gateway.schema import ChatRequest
from router.tokenization.token_text import TokenTexts
from router.tokenization.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class ChatJob:
    request: ChatRequest

    id_prefix: ClassVar[str] = "chatcmpl-"
    answer_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"
    prompt_field: ClassVar[str] = "messages"
    num_prompts: ClassVar[int] = 1

    @property
    def max_tokens(self) -> tuple[str, int | None]:
        if self.request.max_completion_tokens is not None:
            return "max_completion_tokens", self.request.max_completion_tokens
        return "max_tokens", self.request.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.request.top_logprobs if self.request.logprobs else None

    async def encode(
        self, tokenizer: PromptTokenizer, *, context: int, vocab_size: int
    ) -> list[list[int]]:
        messages = [message.for_template() for message in self.request.messages]
        return [await tokenizer.encode_chat(messages, max_tokens=context)]

    def answer_choice(self, answer: Answer) -> dict[str, Any]:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        news: dict[str, str] = {}
        if delta.first:
            news["role"] = "assistant"
        if delta.first or delta.text:
            news["content"] = delta.text
        return {
            "index": delta.index,
            "delta": news,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
        }

    def logprobs(self, tokens: Sequence[LoggedToken], texts: TokenTexts) -> dict[str, Any] | None:
        return chat_logprobs(tokens, texts)
