"""Which dtype a machine computes in."""

from __future__ import annotations

import pytest
import torch

from baton.errors import ConfigurationError
from engine.platform import resolve_dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": True}, torch.bfloat16),
        ({"architecture": "x86_64", "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "bf16": False, "fp16_arith": True}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto") == expected
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("float32") == torch.float32


def test_auto_answers_on_this_machine() -> None:
    assert resolve_dtype("auto") in (torch.bfloat16, torch.float32)


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'int8'.*bfloat16, float32"):
        resolve_dtype("int8")
