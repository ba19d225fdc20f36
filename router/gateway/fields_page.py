"""The field table as Markdown. ``python -m router.gateway.fields_page docs/api.md``
writes it into that page, between the markers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from router.gateway.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    STREAM_OPTIONS_FIELDS,
    Table,
)

TABLES = {
    "chat": CHAT_FIELDS,
    "message": MESSAGE_FIELDS,
    "part": PART_FIELDS,
    "completion": COMPLETION_FIELDS,
    "stream_options": STREAM_OPTIONS_FIELDS,
}


def markdown_table(table: Table) -> str:
    rows = ["| field | treatment | accepted values | note |", "|---|---|---|---|"]
    for field in table.values():
        name = f"`{field.name}`" + (" (extension)" if field.extension else "")
        rows.append(f"| {name} | {field.treatment.value} | {field.values} | {field.note} |")
    return "\n".join(rows)


def fill(page: str) -> str:
    """The page with each ``<!-- fields: NAME -->`` section filled from the code."""
    for name, table in TABLES.items():
        section = re.compile(
            rf"(<!-- fields: {name} -->\n).*?(<!-- end of fields -->)", flags=re.DOTALL
        )
        filled = markdown_table(table)
        page, count = section.subn(lambda m, text=filled: f"{m[1]}{text}\n{m[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page has {count} sections for the fields of {name!r}, not one")
    return page


def main(path: Path) -> None:
    path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
