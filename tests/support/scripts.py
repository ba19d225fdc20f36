"""Programs of scripts/, run in this process."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from support.chart import ROOT


def load(name: str) -> ModuleType:
    """A fresh module of ``scripts/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As from the command line. Raises SystemExit where the program exits by itself."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    script.main()
