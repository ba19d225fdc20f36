"""Log-probabilities in the shapes of the OpenAI API: of chats, and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.logprobs import TokenLogprobs
from router.tokenization.token_text import TokenTexts

_LEAST = -9999.0
"""What the OpenAI API says of impossible tokens; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """One token of an answer, with what a client that asked for it is told."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int
    """Characters of the answer before it."""


def chat_logprobs(tokens: Sequence[LoggedToken], texts: TokenTexts) -> dict[str, Any] | None:
    """``choices[].logprobs`` of a chat; None for no tokens."""
    if not tokens:
        return None
    content = [
        _entry(token.token_id, token.logprobs.logprob, texts)
        | {"top_logprobs": [_entry(*likely, texts) for likely in token.logprobs.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    token = texts.of(token_id)
    return {"token": token.text, "logprob": max(logprob, _LEAST), "bytes": list(token.data)}


def completion_logprobs(tokens: Sequence[LoggedToken], texts: TokenTexts) -> dict[str, Any] | None:
    """``choices[].logprobs`` of a completion; None for no tokens.

    Its ``top_logprobs`` go by the tokens' texts, the drawn token always among them; of
    several tokens with one text the likeliest is kept.
    """
    if not tokens:
        return None
    return {
        "text_offset": [token.text_offset for token in tokens],
        "token_logprobs": [max(token.logprobs.logprob, _LEAST) for token in tokens],
        "tokens": [_name(token.token_id, texts) for token in tokens],
        "top_logprobs": [_likeliest(token, texts) for token in tokens],
    }


def _likeliest(token: LoggedToken, texts: TokenTexts) -> dict[str, float]:
    named: dict[str, float] = {}
    for token_id, logprob in (*token.logprobs.top, (token.token_id, token.logprobs.logprob)):
        named.setdefault(_name(token_id, texts), max(logprob, _LEAST))
    return named


def _name(token_id: int, texts: TokenTexts) -> str:
    token = texts.of(token_id)
    return token.text if token.is_text else f"bytes:{token.text}"
