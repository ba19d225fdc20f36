"""docs/deploy.md says what the chart does."""

from __future__ import annotations

import json
import re

import yaml
from support.chart import CHART, COMPLETE, ROOT, render

PAGE = (ROOT / "docs" / "deploy.md").read_text()


def test_values_on_the_page_render() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    rendered = render(yaml.safe_load(blocks[0]))
    assert rendered.group("decode")["replicas"] == 3
    assert rendered.all("Secret") == []


def test_names_in_the_commands_are_those_of_the_trial() -> None:
    rendered = render(COMPLETE["values-cpu.yaml"])
    named = re.findall(r"\b(deployment|service|secret)[/ ](chat-baton-[a-z-]+)", PAGE)
    assert len(named) >= 5
    there = {(d["kind"].lower(), d["metadata"]["name"]) for d in rendered.documents}
    assert set(named) <= there
    for service, port in re.findall(r"service/(chat-baton-[a-z]+) \d+:(\d+)", PAGE):
        (found,) = rendered.one("Service", service)["spec"]["ports"]
        assert found["port"] == int(port)
    keys = rendered.one("Secret", "secrets")["data"]
    assert set(re.findall(r"\.data\.([a-z-]+)\}", PAGE)) <= set(keys)


def test_settings_on_the_page_exist() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    roots = "|".join(schema["properties"])
    named = re.findall(rf"`((?:{roots})(?:\.[A-Za-z]+)+)", PAGE)
    assert len(named) > 10
    for path in named:
        if path.startswith(("config.", "pools.")):
            continue  # Baton's own, and names of pools
        here = schema
        for key in path.split("."):
            assert key in here["properties"], path
            here = here["properties"][key]
