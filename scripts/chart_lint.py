"""Lints the Helm chart strictly and renders it with each of its values files.

    .venv/bin/python scripts/chart_lint.py

Nothing but the chart is needed: no cluster, no helm. Exit status 1, with one line for each
fault, if there is any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import helm_python as helm
import yaml

CHART = Path(__file__).resolve().parent.parent / "charts" / "baton"

_WARNING = 2
"""Severity of a finding from which on it counts."""


def faults(chart: Path) -> Iterator[str]:
    """One line for each, of the chart in that folder and its values files."""
    files = sorted(chart.glob("values-*.yaml"))
    if not files:
        yield f"{chart}: no values-*.yaml to render"
    for file in files:
        values = yaml.safe_load(file.read_text())
        for found in helm.lint(chart, values, strict=True)["messages"]:
            if found["severity"] >= _WARNING:
                yield f"{file.name}: {found['path']}: {found['error']}"
        try:
            with helm.Chart.load(chart) as loaded:
                rendered = loaded.render(values, name="release", namespace="namespace")
            for name, text in rendered.items():
                if name.endswith(".yaml"):
                    list(yaml.safe_load_all(text))
        except (helm.HelmError, yaml.YAMLError) as error:
            yield f"{file.name}: {error}"


def main() -> None:
    found = list(faults(Path(sys.argv[1]) if len(sys.argv) > 1 else CHART))
    for line in found:
        print(f"chart: {line}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
