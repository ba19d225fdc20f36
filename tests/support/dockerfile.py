"""A Dockerfile, read far enough to check it and to know what its image runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line, continuations joined: ``RUN`` and what follows it."""

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """What follows as a list, whether written as JSON or plainly."""
        if self.value.startswith("["):
            return [str(word) for word in json.loads(self.value)]
        return self.value.split()


@dataclass(frozen=True, slots=True)
class Stage:
    """From one FROM to the next."""

    base: str
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    def environment(self) -> dict[str, str]:
        """What ENV sets; values have no blanks in these files."""
        words = [word for each in self.all("ENV") for word in each.words]
        return dict(word.split("=", 1) for word in words)

    def entrypoint(self) -> list[str]:
        """As the image runs it; AssertionError unless it is in exec form, exactly once."""
        (entrypoint,) = self.all("ENTRYPOINT")
        assert entrypoint.value.startswith("["), "ENTRYPOINT in exec form gets the signals"
        return entrypoint.words


def read_dockerfile(path: Path) -> list[Stage]:
    """Its stages in order."""
    text = path.read_text().replace("\\\n", " ")
    stages: list[tuple[str, list[Instruction]]] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.strip().partition(" ")
        if name == "FROM":
            stages.append((value.split()[0], []))
        else:
            stages[-1][1].append(Instruction(name, value.strip()))
    return [Stage(base, tuple(instructions)) for base, instructions in stages]
