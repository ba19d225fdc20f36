"""Token ids of one choice to text, as they arrive.

The pieces of a choice, joined, equal ``tokenizer.decode(ids,
skip_special_tokens=True)`` of all its ids, and no piece ends inside a character.
Two ways, by the checkpoint's own decoder:

- ByteLevel (GPT-2, Llama 3, SmolLM, Qwen): a token is bytes whatever surrounds
  it, so an incremental UTF-8 decoder is exact and costs the same for each token.
- Any other (SentencePiece and the like): a token's text may depend on the one
  before it, so the last settled tokens are decoded anew with those that follow.
"""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from tokenizers import Tokenizer, decoders

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")
_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 16
"""Of a window whose text ends in a replacement character; a character has at most four bytes."""


class Detokenizer(Protocol):
    """State of one choice; not for use after ``flush``."""

    def push(self, token_id: int) -> str:
        """Takes the next id; returns the text that is now settled, often empty."""
        ...

    def flush(self) -> str:
        """The text still held back, an incomplete character replaced."""
        ...


class Detokenizers:
    """Makes a Detokenizer for each choice; holds what they share of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        }
        self._bytes: dict[int, bytes] = {}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)

    def new(self) -> Detokenizer:
        return _ByteLevelDetokenizer(self) if self._byte_level else _WindowDetokenizer(self)

    def token(self, token_id: int) -> str | None:
        """The token's own string; None where nothing is rendered of it."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return None if token is None or token in self._special else token

    def token_bytes(self, token_id: int) -> bytes:
        """What a ByteLevel decoder makes of the token; the first look-up is kept."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = byte_level_bytes(self.token(token_id) or "")
        return known

    def decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """What a ByteLevel decoder makes of a token's own string."""
    # A token with a character outside the alphabet (an added one) stands for itself.
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode()


class _ByteLevelDetokenizer:
    def __init__(self, shared: Detokenizers) -> None:
        self._shared = shared
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._shared.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDetokenizer:
    """``_window`` begins with the tokens of the last settled piece, whose text in
    this window is ``_prefix``; what follows is not settled yet."""

    def __init__(self, shared: Detokenizers) -> None:
        self._shared = shared
        self._ids: list[int] = []
        self._emitted: list[str] = []
        self._window: list[int] = []
        self._num_settled = 0
        self._prefix = ""

    def push(self, token_id: int) -> str:
        token = self._shared.token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        self._window.append(token_id)
        if BYTE_TOKEN.match(token):
            # A run of byte tokens is decoded as a whole, so it settles when it ends.
            return ""
        text = self._shared.decode(self._window)
        num_held = len(self._window) - self._num_settled
        if text.endswith(_REPLACEMENT) and num_held < _MAX_HELD_TOKENS:
            return ""
        piece = text[len(self._prefix) :] if text.startswith(self._prefix) else ""
        self._settle(piece)
        return piece

    def flush(self) -> str:
        whole, emitted = self._shared.decode(self._ids), "".join(self._emitted)
        if whole.startswith(emitted):
            return whole[len(emitted) :]
        # A decoder that rewrites what it has shown: the window's own end is all one can add.
        return self._shared.decode(self._window)[len(self._prefix) :]

    def _settle(self, piece: str) -> None:
        self._emitted.append(piece)
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        self._prefix = self._shared.decode(self._window)
