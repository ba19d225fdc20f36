"""`make check` lints the chart."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.chart import CHART, ROOT
from support.scripts import load, run


def test_the_chart_passes() -> None:
    script = ROOT / "scripts" / "chart_lint.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("values-cpu.yaml", "embedded: {enabled: true}", "embedded: {enabled: 1}", "enabled"),
        ("values-cpu.yaml", "redis:\n", "redos:\n", "redos"),
        ("values-h100-rdma.yaml", "nvidia.com/gpu: 4}", "nvidia.com/gpu: 2}", "has 2 GPUs"),
        ("templates/gateway.yaml", "kind: Deployment", "kind: {{ .Values.a.b }}", "gateway.yaml"),
        ("templates/gateway.yaml", "kind: Deployment", "kind: [", "gateway.yaml"),
        ("Chart.yaml", "version: 0.1.0", "version: one", "version"),
    ],
)
def test_a_fault_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    old: str,
    new: str,
    said: str,
) -> None:
    chart = tmp_path / "baton"
    shutil.copytree(CHART, chart)
    text = (chart / file).read_text()
    assert old in text
    (chart / file).write_text(text.replace(old, new))
    with pytest.raises(SystemExit) as ended:
        run(load("chart_lint"), monkeypatch, str(chart))
    assert ended.value.code == 1
    assert said in capsys.readouterr().err
