"""A value that is taken away by `null` is empty already, or is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import helm_python as helm
import pytest
import yaml
from support.chart import CHART, GIVEN, Rendered, merged, render

Json = dict[str, Any]
Path = tuple[str, ...]

EMBEDDED: Json = merged(
    GIVEN,
    {
        "redis": {"url": "", "embedded": {"enabled": True, "password": {"value": "p"}}},
        "rayRedis": {"address": "", "password": {"value": "q"}, "embedded": {"enabled": True}},
    },
)

FREE = {"config", "pools", "podSecurityContext", "securityContext"}
"""Sections whose keys may be taken away though the chart gives them values."""


def _leaves(values: Json, *path: str) -> Iterator[tuple[Path, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, *path, key)
        else:
            yield (*path, key), value


LEAVES = dict(_leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
EMPTY = [path for path, value in LEAVES.items() if value in ("", [], {})]


def _is_free(path: Path) -> bool:
    return path[0] in FREE or "resources" in path or path[-1] == "suffix"


NEEDED = [path for path in LEAVES if path not in EMPTY and not _is_free(path)]
OTHERS = [path for path in LEAVES if path not in EMPTY and _is_free(path)]


def _without(path: Path) -> Json:
    over: Any = None
    for key in reversed(path):
        over = {key: over}
    return dict(over)


def _has_a_hole(node: Any) -> bool:
    if isinstance(node, dict):
        return any(_has_a_hole(each) for each in node.values())
    if isinstance(node, list):
        return any(_has_a_hole(each) for each in node)
    return node is None


def _is_whole(rendered: Rendered) -> bool:
    said = [*rendered.documents, yaml.safe_load(rendered.baton_yaml)]
    return not _has_a_hole(said) and "<no value>" not in rendered.text and "%!" not in rendered.text


@pytest.mark.parametrize("base", [GIVEN, EMBEDDED], ids=["given", "embedded"])
@pytest.mark.parametrize("path", EMPTY + OTHERS, ids=".".join)
def test_what_is_taken_away_leaves_no_hole(path: Path, base: Json) -> None:
    said = ""
    try:
        assert _is_whole(render(base, _without(path)))
    except helm.HelmError as error:
        said = str(error)
    # The schema's words, or a sentence of the chart's, but no fault inside of it.
    named = rf"missing property '{path[-1]}'|execution error at \(\S+\): \w"
    assert not said or re.search(named, said), said
    assert "error calling" not in said


@pytest.mark.parametrize("path", NEEDED, ids=".".join)
def test_what_is_needed_is_refused_by_its_name(path: Path) -> None:
    with pytest.raises(helm.HelmError, match=f"missing property '{path[-1]}'"):
        render(GIVEN, _without(path))


@pytest.mark.parametrize("base", [GIVEN, EMBEDDED], ids=["given", "embedded"])
def test_the_chart_itself_leaves_no_hole(base: Json) -> None:
    """So each hole above is of what the case takes away."""
    assert _is_whole(render(base))
