"""Typed access to the content of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from baton.errors import CheckpointError

_MOST = 2**31 - 1
"""Of any count: what no dimension of a tensor is."""


def is_positive(value: float) -> bool:
    """Over 0, and such that it can be divided by and multiplied with."""
    return 1e-30 <= value <= 1e30


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """The content, or one section of it; every complaint names the field and the file.

    A field that is null counts as absent.
    """

    data: Mapping[str, Any]
    where: str

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {message}")

    def get(self, name: str) -> Any:
        """The value, or None where it is absent or null."""
        return self.data.get(name)

    def count(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST
    ) -> int:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fail(f"{name} is {value!r:.80}; expected a whole number of {least} or more")
        if value > most:
            self.fail(f"{name} is {value!r:.80}; expected {most} or less")
        return int(value)

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{name} is missing")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not is_positive(value):
            self.fail(f"{name} is {value!r:.80}; expected a number over 0, of 1e-30 to 1e30")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(f"{name} is {value!r:.80}; expected true or false")
        return default if value is None else bool(value)

    def items(self, name: str, *kinds: type) -> tuple[Any, ...] | None:
        """The list, each item of one of ``kinds``, or None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(
            isinstance(item, kinds) and not isinstance(item, bool) for item in value
        ):
            expected = " or ".join(kind.__name__ for kind in kinds)
            self.fail(f"{name} is {value!r:.80}; expected a list of {expected}")
        return tuple(value)

    def section(self, name: str) -> ConfigFields:
        """The object of that name; an empty one where it is absent."""
        value = self.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self.fail(f"{name} is {value!r:.80}; expected an object")
        return ConfigFields(value, f"{self.where}: {name}")
