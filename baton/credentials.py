"""The keys, tokens and secrets of the environment: read here, and shown and compared as bytes.

Each travels in a header, as ``Bearer`` and its UTF-8 bytes. Whitespace around it is none of it:
what makes a file of it often leaves a line's end there.
"""

from __future__ import annotations

import hmac
import os
import unicodedata
from collections.abc import Iterable

from baton.errors import ConfigurationError

API_KEY = "BATON_API_KEY"
CLUSTER_SECRET = "BATON_SECRET"
CONTROLLER_TOKEN = "BATON_CONTROLLER_TOKEN"

_HEADER = b"authorization"


def credential(name: str) -> str | None:
    """What the variable holds, without the whitespace around it; None where it is not set, or
    empty.

    Raises ConfigurationError, which never shows it, for nothing but whitespace, and for what
    no client could send: whitespace or a control character inside, bytes that are no UTF-8, and
    in the cluster's secret, which goes through gRPC's metadata, anything but ASCII.
    """
    given = os.environ.get(name, "")
    value = given.strip()
    if given and not value:
        raise ConfigurationError(f"{name} is nothing but whitespace; give it a value, or unset it")
    if any(character.isspace() for character in value):
        raise ConfigurationError(f"{name} has whitespace inside; it has to be one word")
    kinds = {unicodedata.category(character) for character in value}
    if "Cc" in kinds:
        raise ConfigurationError(
            f"{name} has a control character inside, which no HTTP header can carry"
        )
    if "Cs" in kinds:
        raise ConfigurationError(f"{name} is not UTF-8")
    if name == CLUSTER_SECRET and not value.isascii():
        raise ConfigurationError(f"{name} may hold ASCII alone: it travels as gRPC metadata")
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
        self._expected = bearer(value)

    def passes(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """``headers``: as they came, names in lower case, as ASGI gives them."""
        given = next((value for name, value in headers if name == _HEADER), b"")
        return hmac.compare_digest(given, self._expected)
