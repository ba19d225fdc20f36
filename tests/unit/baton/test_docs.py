"""The documentation names every setting, every metric, and only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from baton.config import BatonConfig
from baton.telemetry import GatewayMetrics, WorkerMetrics

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += settings(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def test_every_setting_and_metric_is_documented_and_no_other() -> None:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    WorkerMetrics(registry, worker_id="w", role="decode")
    metrics = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
    }
    page = (ROOT / "docs" / "configuration.md").read_text()
    documented = re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.MULTILINE)
    assert sorted(documented) == sorted([*settings(BatonConfig), *metrics])


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    targets = [page.parent / target for target in re.findall(r"\]\((?!http)([^)#]+)", text)]
    assert [str(target) for target in targets if not target.exists()] == []
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|proto|toml))`", text)
    rooms = [ROOT, *(init.parent for init in ROOT.glob("*/__init__.py"))]
    assert [name for name in named if not any((room / name).exists() for room in rooms)] == []
