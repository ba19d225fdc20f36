"""What is tested of every architecture: tests run these cells, docs/models.md shows them.

A cell is an architecture as it is stored, on so many ranks, served in one of the ``WAYS``.
``tests/integration/test_model_coverage.py`` runs each cell that ``cells`` gives;
``scripts/models_page.py`` writes the table. It needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baton.checkpoint.architectures import ARCHITECTURES
from baton.parallelism import Parallelism

FOLDER, GGUF = "folder", "GGUF"
WAYS = ("prefix cache", "chunked prefill", "disaggregated")
ONE_PROCESS = "1"
RANKS = {ONE_PROCESS: Parallelism(), "TP 2": Parallelism(2), "EP 2": Parallelism(1, 2)}
HEADS = ("architecture", "stored as", *WAYS)


@dataclass(frozen=True, slots=True)
class Tried:
    """The tiny models (names of ``VARIANTS``) that stand for an architecture.

    ``gguf`` is None where GGUF files of it are refused. ``not_tested`` are names of
    ``RANKS`` that the architecture can be split over, and no test does.
    """

    folder: str
    gguf: str | None
    has_experts: bool = False
    not_tested: tuple[str, ...] = ()

    def ranks(self) -> list[str]:
        """All that it can be split over."""
        return [name for name, split in RANKS.items() if split.expert == 1 or self.has_experts]


TRIED = {
    "LlamaForCausalLM": Tried("llama, rope llama3", "llama"),
    "MistralForCausalLM": Tried("mistral, window", "mistral"),
    "Qwen2ForCausalLM": Tried("qwen2, window of the upper layers", "qwen2"),
    "Qwen3ForCausalLM": Tried("qwen3, window", "qwen3"),
    "MixtralForCausalLM": Tried("mixtral", "mixtral", has_experts=True),
    "Qwen3MoeForCausalLM": Tried("qwen3 moe", "qwen3 moe", has_experts=True),
    "SmolLM3ForCausalLM": Tried("smollm3", None),
    "DeepseekV2ForCausalLM": Tried("deepseek v2, groups", None, has_experts=True),
    "DeepseekV3ForCausalLM": Tried("deepseek v3, rope yarn", None, has_experts=True),
}


@dataclass(frozen=True, slots=True)
class Served:
    """A tiny model as it is stored, and how many ranks compute it."""

    variant: str
    stored: str
    ranks: str

    def __str__(self) -> str:
        return f"{self.variant}-{self.stored}-{self.ranks}"


def served(architecture: str, stored: str) -> list[Served]:
    """On every number of ranks; nothing where nobody has declared how it is tried."""
    tried = TRIED.get(architecture)
    variant = tried and (tried.folder if stored == FOLDER else tried.gguf)
    if not tried or not variant:
        return []
    names = [name for name in tried.ranks() if name not in tried.not_tested]
    return [Served(variant, stored, name) for name in names]


def cells() -> Iterator[tuple[Served, str]]:
    """All that is tested: what is served, and the way."""
    for architecture in ARCHITECTURES:
        for stored in (FOLDER, GGUF):
            for each in served(architecture, stored):
                for way in WAYS:
                    yield each, way


def table() -> list[str]:
    """Lines of markdown, a row for each architecture and format."""
    rows = [HEADS, ("---",) * len(HEADS)]
    for architecture in ARCHITECTURES:
        for stored in (FOLDER, GGUF):
            rows.append(
                (f"`{architecture}`", stored, *(_cell(architecture, stored, w) for w in WAYS))
            )
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(architecture: str, stored: str, way: str) -> str:
    tried = TRIED.get(architecture)
    if tried is None:
        return "not tested"
    if stored == GGUF and tried.gguf is None:
        return "refused"
    run = set(cells())
    tested = {each.ranks for each in served(architecture, stored) if (each, way) in run}
    return ", ".join(name if name in tested else f"not {name}" for name in tried.ranks())
