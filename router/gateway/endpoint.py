"""What the two generating endpoints do differently; the rest treats them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from router.gateway.choices import Delta
from router.gateway.logprobs import LoggedToken
from router.gateway.schema import GenerationRequest
from router.request import FinishReason
from router.tokenization.token_text import TokenTexts
from router.tokenization.tokenizer import PromptTokenizer


@dataclass(slots=True, eq=False)
class Answer:
    """One choice, put together from its deltas."""

    index: int
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logged: list[LoggedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.logged += delta.logged
        self.finish_reason = delta.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Job(Protocol):
    """One request to a generating endpoint, with the shapes of its answers."""

    @property
    def request(self) -> GenerationRequest: ...

    @property
    def id_prefix(self) -> str: ...

    @property
    def answer_object(self) -> str: ...

    @property
    def chunk_object(self) -> str: ...

    @property
    def prompt_field(self) -> str: ...

    @property
    def num_prompts(self) -> int: ...

    @property
    def max_tokens(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and its value if the client set it."""
        ...

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens each token is to come with; None: no log-probabilities."""
        ...

    async def encode(
        self, tokenizer: PromptTokenizer, *, context: int, vocab_size: int
    ) -> list[list[int]]:
        """Token ids of each prompt. Raises InvalidRequestError, naming the field."""
        ...

    def answer_choice(self, answer: Answer) -> dict[str, Any]: ...

    def chunk_choice(self, delta: Delta) -> dict[str, Any]: ...

    def logprobs(
        self, tokens: Sequence[LoggedToken], texts: TokenTexts
    ) -> dict[str, Any] | None: ...
