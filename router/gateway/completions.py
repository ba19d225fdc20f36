"""``/v1/completions``: text or token ids in, their continuation out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from baton.errors import InvalidRequestError
from router.gateway.choices import Delta
from router.gateway.endpoint import Answer
from router.gateway.logprobs import LoggedToken, completion_logprobs
from router.gateway.schema import CompletionRequest
from router.tokenization.token_text import TokenTexts
from router.tokenization.tokenizer import PromptTokenizer


@dataclass(frozen=True, slots=True)
class CompletionJob:
    request: CompletionRequest

    id_prefix: ClassVar[str] = "cmpl-"
    answer_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"
    prompt_field: ClassVar[str] = "prompt"

    @property
    def num_prompts(self) -> int:
        return len(self.request.prompts)

    @property
    def max_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", self.request.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.request.logprobs

    async def encode(
        self, tokenizer: PromptTokenizer, *, context: int, vocab_size: int
    ) -> list[list[int]]:
        prompts = self.request.prompts
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts:
            return await tokenizer.encode_texts(texts, max_tokens=context, param="prompt")
        ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
        for number, prompt in enumerate(ids):
            if max(prompt) >= vocab_size:
                raise self._outside(prompt, number, vocab_size)
        return ids

    def _outside(self, prompt: list[int], number: int, vocab_size: int) -> InvalidRequestError:
        place, token_id = next(item for item in enumerate(prompt) if item[1] >= vocab_size)
        in_batch = isinstance(self.request.prompt[0], list)
        path = f"prompt.{number}.{place}" if in_batch else f"prompt.{place}"
        return InvalidRequestError(
            f"'{path}': token id {token_id} is outside the vocabulary of {vocab_size}", param=path
        )

    def answer_choice(self, answer: Answer) -> dict[str, Any]:
        return self._choice(answer.index, answer.text, answer.finish_reason)

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta.index, delta.text, delta.finish_reason)

    def logprobs(self, tokens: Sequence[LoggedToken], texts: TokenTexts) -> dict[str, Any] | None:
        return completion_logprobs(tokens, texts)

    @staticmethod
    def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
