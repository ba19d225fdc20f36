"""Typed access to the key-value metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from baton.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufFields:
    """The metadata; every complaint names the key and the file."""

    where: str
    values: Mapping[str, Any]

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {message}")

    @property
    def architecture(self) -> str:
        """What the file calls its kind of model; its own keys begin with that."""
        return self.require("general.architecture", str)

    def own(self, name: str) -> str:
        """The key of the architecture's own setting ``name``."""
        return f"{self.architecture}.{name}"

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of ``key``, or None. Raises CheckpointError if it is no ``kind``."""
        value = self.values.get(key)
        if value is None:
            return None
        # bool is an int to Python, but not here.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"{key} is {value!r:.80}; expected {kind.__name__}")
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of ``key``. Raises CheckpointError if it is missing or no ``kind``."""
        value = self.optional(key, kind)
        if value is None:
            self.fail(f"{key} is missing")
        return value

    def items(self, key: str, kind: type[T]) -> list[T]:
        """The array of ``key``. Raises CheckpointError if it is missing or has other items."""
        values = self.require(key, list)
        for value in values:
            if not isinstance(value, kind):
                self.fail(f"{key} has {value!r:.80} in it; expected {kind.__name__} alone")
        return values
