"""Writes Baton's settings into charts/baton/values.schema.json, as definitions.

    .venv/bin/python scripts/chart_schema.py [--check]

So Helm refuses an unknown setting before anything is installed, and not the pods afterwards.
Generated definitions are named like the classes of baton/config.py and begin with a capital;
all others are written by hand. With --check the file stays as it is: exit status 1 if it differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from baton.config import BatonConfig

Json = dict[str, Any]

SCHEMA = Path(__file__).resolve().parent.parent / "charts" / "baton" / "values.schema.json"

_LEFT_TO_THE_TEMPLATES = ("model", "pools")
"""Refused under `config` in a sentence of their own, which a schema cannot say."""

_SHOWN_THOUGH_REFUSED = {"KvTransferConfig": {"transport": ["nixl"]}}
"""What the chart renders and today's Baton does not read: the notes after an install say so."""


def _bare(schema: Any) -> Any:
    """Without titles, and without defaults: the chart has some of its own."""
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for key, value in schema.items():
        if key == "properties":
            found[key] = {name: _bare(each) for name, each in value.items()}
        elif key == "description":
            found[key] = " ".join(value.split())
        elif key not in ("title", "default"):
            found[key] = _bare(value)
    return found


def definitions() -> Json:
    """Of every section of the configuration, and of the whole, by the class's name."""
    root = BatonConfig.model_json_schema(ref_template="#/definitions/{model}")
    sections = root.pop("$defs")
    for key in _LEFT_TO_THE_TEMPLATES:
        root["properties"][key] = {}
    del sections["PoolConfig"]
    for name, settings in _SHOWN_THOUGH_REFUSED.items():
        for setting, values in settings.items():
            sections[name]["properties"][setting]["enum"] += values
    found: Json = _bare({**sections, BatonConfig.__name__: root})
    return {name: found[name] for name in sorted(found)}


def main() -> None:
    old = SCHEMA.read_text()
    schema = json.loads(old)
    own = {name: each for name, each in schema["definitions"].items() if not name[0].isupper()}
    schema["definitions"] = own | definitions()
    new = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    if sys.argv[1:] != ["--check"]:
        SCHEMA.write_text(new)
    elif new != old:
        sys.exit(f"{SCHEMA.name} is out of date; run scripts/chart_schema.py")


if __name__ == "__main__":
    main()
