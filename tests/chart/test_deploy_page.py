"""docs/deploy.md says what the chart does."""

from __future__ import annotations

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
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    roots = "|".join(values)
    for path in re.findall(rf"`((?:{roots})(?:\.[A-Za-z]+)+)", PAGE):
        here = values
        for key in path.split("."):
            if here is values["config"]:
                break  # Baton's own: the configuration's tests know them
            assert key in here, path
            here = here[key]
