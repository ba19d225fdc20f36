"""What one token stands for, whatever comes before and after it.

A token may be a piece of a character: then its bytes are no UTF-8, and its text
shows those that are none as ``\\xf0``, as the OpenAI API does. Special tokens have
their own names for text.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders

from router.tokenization.detokenizer import BYTE_TOKEN, byte_level_bytes


@dataclass(frozen=True, slots=True)
class TokenText:
    text: str
    data: bytes
    is_text: bool
    """``data`` is UTF-8: the text is what it spells."""


class TokenTexts:
    """Of one tokenizer's tokens; the first look-up of each is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._known: dict[int, TokenText] = {}

    def of(self, token_id: int) -> TokenText:
        """Of an id without a token, as a padded vocabulary has, the text is empty."""
        known = self._known.get(token_id)
        if known is None:
            data = self._bytes(token_id)
            text = data.decode(errors="backslashreplace")
            known = self._known[token_id] = TokenText(text, data, text.encode() == data)
        return known

    def _bytes(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._added:
            return (token or "").encode()
        if self._byte_level:
            return byte_level_bytes(token)
        if BYTE_TOKEN.match(token):
            return bytes([int(token[3:5], 16)])
        # Decoders of this kind take a space from the beginning, so the token is seen
        # after itself.
        one, two = self._decode([token_id]), self._decode([token_id, token_id])
        return (two[len(one) :] if two.startswith(one) else one).encode()

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
