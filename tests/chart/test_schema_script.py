"""`make check` keeps Baton's settings in the chart's schema up to date."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest
from support.chart import CHART
from support.scripts import load, run

from baton.config import BatonConfig


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """It works on a copy of the schema."""
    module = load("chart_schema")
    copy = shutil.copy(CHART / "values.schema.json", tmp_path)
    monkeypatch.setattr(module, "SCHEMA", Path(copy))
    return module


def test_the_schema_is_up_to_date(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run(script, monkeypatch, "--check")


@pytest.mark.parametrize("section", ["EngineConfig", "BatonConfig"])
def test_a_stale_schema_is_found_and_written_anew(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    good = script.SCHEMA.read_text()
    schema = json.loads(good)
    schema["definitions"][section]["properties"].popitem()
    stale = json.dumps(schema, indent=2)
    script.SCHEMA.write_text(stale)
    with pytest.raises(SystemExit, match="out of date; run scripts/chart_schema"):
        run(script, monkeypatch, "--check")
    assert script.SCHEMA.read_text() == stale
    run(script, monkeypatch)
    assert script.SCHEMA.read_text() == good


def test_what_batons_code_no_longer_has_is_taken_away(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = script.SCHEMA.read_text()
    schema = json.loads(good)
    schema["definitions"]["GoneConfig"] = {}
    script.SCHEMA.write_text(json.dumps(schema))
    run(script, monkeypatch)
    assert script.SCHEMA.read_text() == good


def test_types_of_kubernetes_are_written_anew(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = script.SCHEMA.read_text()
    schema = json.loads(good)
    schema["$defs"]["Probe"]["additionalProperties"] = True
    schema["$defs"]["Gone"] = {}
    script.SCHEMA.write_text(json.dumps(schema))
    with pytest.raises(SystemExit, match="out of date"):
        run(script, monkeypatch, "--check")
    run(script, monkeypatch)
    assert script.SCHEMA.read_text() == good


def test_batons_defaults_meet_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    whole = {"$ref": "#/definitions/BatonConfig", "definitions": schema["definitions"]}
    jsonschema.Draft7Validator(whole).validate(BatonConfig().model_dump(mode="json"))
