"""The keys, tokens and secrets of the environment: read here, and shown and compared as bytes.

Each travels in a header after ``Bearer``, so it is of what every client can send there: visible
ASCII. Whitespace around it is none of it: what makes a file of it often leaves a line's end there.
"""

from __future__ import annotations

import hmac
import os
import string
from collections.abc import Iterable

from baton.errors import ConfigurationError

API_KEY = "BATON_API_KEY"
CLUSTER_SECRET = "BATON_SECRET"
CONTROLLER_TOKEN = "BATON_CONTROLLER_TOKEN"

_HEADER = b"authorization"
_SCHEME = b"bearer"
_BLANKS = b" \t"


def credential(name: str) -> str | None:
    """What the variable holds, without the ASCII whitespace around it; None where it is not set,
    or empty.

    Raises ConfigurationError, which never shows it, for nothing but whitespace, and for what is no
    one word of visible ASCII: of anything else, clients send different bytes or none. The chart
    refuses the same when it is rendered (charts/baton/templates/_secrets.tpl).
    """
    given = os.environ.get(name, "")
    value = given.strip(string.whitespace)
    if given and not value:
        raise ConfigurationError(f"{name} is nothing but whitespace; give it a value, or unset it")
    if any(character.isspace() for character in value):
        raise ConfigurationError(f"{name} has whitespace inside; it has to be one word")
    if not value.isascii():
        raise ConfigurationError(
            f"{name} is not ASCII, and not every client can send that in a header; use letters "
            "without accents, digits and punctuation"
        )
    if not value.isprintable():
        raise ConfigurationError(
            f"{name} has a control character inside, which no HTTP header can carry"
        )
    return value or None


def take_credential(name: str) -> str | None:
    """The same, and takes it out of the environment, so that no child process inherits it."""
    try:
        return credential(name)
    finally:
        os.environ.pop(name, None)


def bearer(value: str) -> bytes:
    """The ``Authorization`` header's value that shows it."""
    return f"Bearer {value}".encode()


class BearerCheck:
    """Asks HTTP requests for one key or token, compared in constant time."""

    def __init__(self, value: str) -> None:
        self._expected = value.encode()

    def passes(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """``headers``: as they came, names in lower case, as ASGI gives them.

        The scheme may be of any case, and blanks may follow it and the value: RFC 9110,
        sections 11.1, 11.4 and 5.5.
        """
        given = next((value for name, value in headers if name == _HEADER), b"")
        scheme, _, shown = given.strip(_BLANKS).partition(b" ")
        fits = hmac.compare_digest(shown.lstrip(b" "), self._expected)
        return fits and scheme.lower() == _SCHEME
