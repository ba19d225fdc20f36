"""A chat's history, which grows by a question and an answer a turn until the context is full."""

from __future__ import annotations

from benchmarks.prompts import Message

_CHARACTERS_PER_TOKEN = 3
"""Fewer than there are in English, so that an estimate is seldom too low."""
_TURN_TOKENS = 24
"""What a chat template puts around a turn, and its beginning around the first one."""
_FIRST_TURN_TOKENS = 64


def estimated_tokens(text: str) -> int:
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


class Conversation:
    """``context`` is what prompt and answer must fit into together, in tokens."""

    def __init__(self, *, context: int, answer_tokens: int) -> None:
        self.messages: list[Message] = []
        self.num_turns = 0
        self._num_tokens = _FIRST_TURN_TOKENS
        self._context = context
        self._answer_tokens = answer_tokens

    def ask(self, question: str, num_tokens: int | None = None) -> bool:
        """Adds the user's message; False, and nothing is added, where it might not fit.

        ``num_tokens`` is the question's length where it is known.
        """
        length = estimated_tokens(question) if num_tokens is None else num_tokens
        needed = self._num_tokens + length + _TURN_TOKENS
        if needed + self._answer_tokens > self._context:
            return False
        self.messages.append({"role": "user", "content": question})
        self._num_tokens = needed
        return True

    def answered(self, text: str, *, num_prompt_tokens: int | None, num_tokens: int) -> None:
        """Adds the assistant's message; the server's own count replaces the estimate."""
        self.messages.append({"role": "assistant", "content": text})
        prompt = self._num_tokens if num_prompt_tokens is None else num_prompt_tokens
        self._num_tokens = prompt + num_tokens
        self.num_turns += 1
