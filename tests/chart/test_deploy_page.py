"""docs/deploy.md says what the chart does."""

from __future__ import annotations

import argparse
import json
import re
import shlex

import httpx
import yaml
from support.chart import CHART, COMPLETE, ROOT, render
from support.controller_rig import ControllerRig
from support.scripts import load

from cluster.controller_app import Seat, create_controller_app

PAGE = (ROOT / "docs" / "deploy.md").read_text()


def test_values_on_the_page_render() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    rendered = render(yaml.safe_load(blocks[0]))
    assert rendered.group("decode")["replicas"] == 3
    assert rendered.all("Secret") == []


def test_names_in_the_commands_are_those_of_the_trial() -> None:
    rendered = render(COMPLETE["values-cpu.yaml"])
    named = re.findall(r"\b(deployment|service|secret|statefulset)[/ ](chat-baton-[a-z-]+)", PAGE)
    assert len(named) >= 5
    there = {(d["kind"].lower(), d["metadata"]["name"]) for d in rendered.documents}
    assert set(named) <= there
    for service, port in re.findall(r"service/(chat-baton-[a-z]+) \d+:(\d+)", PAGE):
        (found,) = rendered.one("Service", service)["spec"]["ports"]
        assert found["port"] == int(port)
    keys = rendered.one("Secret", "secrets")["data"]
    assert set(re.findall(r"\.data\.([a-z-]+)\}", PAGE)) <= set(keys)


def test_the_head_is_where_the_page_says() -> None:
    (address,) = set(re.findall(r"ray://[^`\s]+", PAGE))
    config = yaml.safe_load(render(COMPLETE["values-cpu.yaml"]).baton_yaml)
    assert address == config["cluster"]["ray_address"]


def test_the_claim_on_the_page_is_the_embedded_redis_own() -> None:
    (name,) = re.findall(r"`(data-[a-z-]+)-0`", PAGE)
    keep = {"redis": {"embedded": {"persistence": {"enabled": True}}}}
    redis = render(COMPLETE["values-cpu.yaml"], keep).one("StatefulSet", "baton-redis")
    (claim,) = redis["spec"]["volumeClaimTemplates"]
    assert name == f"{claim['metadata']['name']}-{redis['metadata']['name']}"


def test_the_page_names_the_kubernetes_by_whose_types_values_are_checked() -> None:
    assert f"the JSON schema of Kubernetes {load('chart_schema').KUBERNETES}" in PAGE


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


async def test_the_pages_way_to_scale_scales() -> None:
    """Its curl command, read by a shell's rules and sent to the controller's application."""
    (command,) = re.findall(r"^curl (?:.*\\\n)*.*/v1/pools(?:.*\\\n)*.*$", PAGE, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    options = argparse.ArgumentParser()
    options.add_argument("-s", action="store_true")
    options.add_argument("-X", dest="method")
    options.add_argument("-H", dest="headers", action="append")
    options.add_argument("-d", dest="body")
    options.add_argument("url")
    given = options.parse_args(words[1:])
    # What curl says of a body by itself.
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for line in given.headers:
        name, value = line.replace("$BATON_CONTROLLER_TOKEN", "t0ken").split(": ", 1)
        headers[name] = value
    rig = ControllerRig()
    await rig.begin()
    app = create_controller_app(Seat(rig.controller), token="t0ken", samples=rig.samples)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        answer = await client.request(
            given.method, given.url, headers=headers, content=given.body.encode()
        )
    await rig.close()
    assert answer.status_code == 200, answer.text
    sizes = {name: pool["desired"] for name, pool in answer.json()["pools"].items()}
    assert sizes == json.loads(given.body)
