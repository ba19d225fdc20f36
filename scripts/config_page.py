"""Writes two tables: every setting in docs/configuration.md, every metric in docs/operations.md.

    .venv/bin/python scripts/config_page.py [--check]

What they say stands beside each setting in baton/config.py and each metric in
baton/telemetry.py. With --check the pages stay as they are: exit status 1 if one differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from baton.config import BatonConfig
from baton.telemetry import ControllerMetrics, GatewayMetrics, WorkerMetrics

DOCS = Path(__file__).resolve().parent.parent / "docs"


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf by its path; the key of a mapping of sections is written ``*``."""
    for name, field in model.model_fields.items():
        kind, path = field.annotation, prefix + name
        if get_origin(kind) is dict:
            kind, path = get_args(kind)[1], f"{path}.*"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{path}.")
        else:
            yield prefix + name, field


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "`none`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _setting_rows() -> list[str]:
    rows = ["| setting | default | |", "|---|---|---|"]
    for path, field in _settings(BatonConfig):
        words = " ".join((field.description or "").split()).replace("``", "`")
        rows.append(f"| `{path}` | {_default(field)} | {words} |")
    return rows


def _metric_rows() -> list[str]:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    WorkerMetrics(registry, worker_id="w", role="decode")
    ControllerMetrics(registry)
    rows = ["| metric | labels | |", "|---|---|---|"]
    for metric in registry._collector_to_names:
        name = metric._name + ("_total" if metric._type == "counter" else "")  # type: ignore[attr-defined]
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)  # type: ignore[attr-defined]
        rows.append(f"| `{name}` | {labels} | {metric._documentation} |")  # type: ignore[attr-defined]
    return rows


def _replaced(page: str, first_row: str, rows: list[str]) -> str:
    """``page`` with ``rows`` for the table that begins with ``first_row``."""
    before, _, rest = page.partition(first_row)
    after = rest.partition("\n\n")[2]
    return "\n\n".join([before.rstrip(), "\n".join(rows), after]).rstrip() + "\n"


def main() -> None:
    tables = (
        (DOCS / "configuration.md", "| setting |", _setting_rows()),
        (DOCS / "operations.md", "| metric |", _metric_rows()),
    )
    for page, first_row, rows in tables:
        old = page.read_text()
        new = _replaced(old, first_row, rows)
        if sys.argv[1:] != ["--check"]:
            page.write_text(new)
        elif new != old:
            sys.exit(f"{page.name} is out of date; run scripts/config_page.py")


if __name__ == "__main__":
    main()
