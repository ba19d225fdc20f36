"""The dashboard and the alert rules ask for metrics, labels and values that exist."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

import baton.errors
import baton.telemetry

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OF_TARGETS = {"namespace", "release"}
"""Labels that Prometheus adds to every series: by the chart's monitors, or by hand."""
OF_PROMQL = {"le", "job", "instance", *OF_TARGETS}
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def dashboard_expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "baton.json").read_text())
    return [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]


def alert_rules() -> list[dict[str, object]]:
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, object]] = group["rules"]
    return rules


EXPRESSIONS = [*dashboard_expressions(), *(str(rule["expr"]) for rule in alert_rules())]


def series() -> dict[str, set[str]]:
    """Every series that Prometheus can have of Baton → its labels."""
    registry = CollectorRegistry()
    for name, value in vars(baton.telemetry).items():
        if name.endswith("Metrics") and inspect.isclass(value):
            worker = name == "WorkerMetrics"
            value(registry, **({"worker_id": "w", "role": "decode"} if worker else {}))
    return {
        metric._name + ending: set(metric._labelnames)
        for metric in registry._collector_to_names
        if isinstance(metric, MetricWrapperBase)
        for ending in ENDINGS[metric._type]
    }


def selectors(expression: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each metric of an expression, with its label → value or pattern."""
    for match in re.finditer(r"(baton_\w+)(?:\{(.*?)\})?", expression):
        labels = re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', match[2] or "")
        yield match[1], dict(labels)


def test_there_is_something_to_check() -> None:
    assert len(dashboard_expressions()) > 20
    assert len(alert_rules()) > 8


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_names_series_and_labels_that_exist(expression: str) -> None:
    known = series()
    named = list(selectors(expression))
    assert named
    labels = set()
    for name, matched in named:
        assert name in known, name
        assert matched.keys() <= known[name] | OF_TARGETS, (name, matched)
        labels |= known[name]
    grouped = re.findall(r"(?:by|on) \(([^)]*)\)", expression)
    for label in {label.strip() for group in grouped for label in group.split(",")}:
        assert label in labels | OF_PROMQL, label


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_workers_series_are_counted_once_however_many_gateways_repeat_them(
    expression: str,
) -> None:
    known = series()
    for name, _ in selectors(expression):
        if "worker" in known[name]:
            place = re.search(rf"(?:max|min) by \(worker\b[^)]*\) \((?:\w+\()?{name}\b", expression)
            assert place, f"{name} is summed over gateways"


def test_outcomes_that_alerts_name_are_codes_of_errors() -> None:
    codes = {
        value.code
        for value in vars(baton.errors).values()
        if inspect.isclass(value) and issubclass(value, baton.errors.BatonError)
    }
    for expression in EXPRESSIONS:
        for name, matched in selectors(expression):
            if name in ("baton_requests_total", "baton_attempts_total", "baton_kv_handoffs_total"):
                for label in matched.keys() - OF_TARGETS:
                    known = codes | {"ok", "first", "ready"}
                    assert set(matched[label].split("|")) <= known, matched[label]


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"].keys() == {"severity"}  # type: ignore[attr-defined]
        assert rule["annotations"].keys() == {"summary", "action"}  # type: ignore[attr-defined]
        used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) - OF_TARGETS
        kept = re.match(r"\w+ by \(([^)]*)\)", str(rule["expr"]))
        assert used <= {label.strip() for label in kept[1].split(",")} if kept else not used


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_is_one_releases(rule: dict[str, object]) -> None:
    """Every aggregation keeps the labels that tell releases apart."""
    expression = str(rule["expr"])
    groups = re.findall(r"\b(?:sum|max|min|count|avg)\b(?: by \(([^)]*)\))?", expression)
    assert groups
    for group in groups:
        assert {label.strip() for label in group.split(",")} >= OF_TARGETS, expression


@pytest.mark.parametrize("expression", dashboard_expressions())
def test_a_panel_shows_the_chosen_releases(expression: str) -> None:
    """And takes workers of one name in two releases for two."""
    for name, matched in selectors(expression):
        assert matched.items() >= {"namespace": "$namespace", "release": "$release"}.items(), name
    for group in re.findall(r"(?:max|min) by \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} >= OF_TARGETS, group


def test_the_dashboard_lets_releases_be_chosen() -> None:
    board = json.loads((DEPLOY / "grafana" / "baton.json").read_text())
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "release"]
    known = series()
    for name in OF_TARGETS:
        asked = re.fullmatch(
            r"label_values\((baton_\w+)(?:\{.*\})?, (\w+)\)", variables[name]["query"]
        )
        assert asked
        assert asked[1] in known
        assert asked[2] == name
        # All of them, and series without such labels too.
        assert variables[name]["current"]["value"] == ["$__all"]
        assert variables[name]["allValue"] == ".*"


def test_dashboards_panels_have_a_place_of_their_own() -> None:
    board = json.loads((DEPLOY / "grafana" / "baton.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
    assert max(x for x, _ in cells) < 24
