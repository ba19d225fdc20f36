"""What a worker does not need goes back to the kernel."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.architecture_check import engine_for, score
from support.tiny_architectures import VARIANTS, save_variant
from support.tiny_engine import tokens

from baton.heap import release_free_memory
from engine.platform import let_go_of_file_pages

_MB = 1 << 20


def resident_mb() -> float:
    return float(psutil.Process().memory_info().rss) / _MB


def test_memory_of_freed_tensors_goes_back_to_the_kernel() -> None:
    """One that lives on above them keeps the heap from shrinking by itself."""
    tensors = [torch.zeros(100 * 1024, dtype=torch.uint8) for _ in range(2000)]
    above = tensors.pop()
    held = resident_mb()
    tensors.clear()
    assert held - resident_mb() < 50, "it went back by itself"
    release_free_memory()
    assert held - resident_mb() > 150
    assert len(above) == 100 * 1024


def resident_kib(path: Path) -> int:
    """Of a file's mappings in this process."""
    total, is_its = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_its = line.endswith(str(path))
        elif is_its and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def mapped(path: Path) -> torch.Tensor:
    """A part of a mapped file, all of whose pages have been read."""
    save_file({"a": torch.arange(1 << 20), "b": torch.ones(1 << 20)}, path)
    with safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor("a"), file.get_tensor("b")]
    assert int(tensors[0].sum()) + int(tensors[1].sum()) > 0
    assert resident_kib(path) > 8192
    return tensors[0]


def test_pages_of_a_mapped_file_are_let_go_and_come_back(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights")
    let_go_of_file_pages(tensor)
    assert resident_kib(tmp_path / "weights") == 0
    assert torch.equal(tensor, torch.arange(1 << 20))


def test_what_was_written_is_not_lost(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "weights")
    tensor[7] = -1
    let_go_of_file_pages(tensor)
    assert int(tensor[7]) == -1
    assert int(tensor[8]) == 8


def test_memory_that_is_no_file_stays_as_it_is() -> None:
    tensor = torch.arange(1 << 22)
    let_go_of_file_pages(tensor)
    assert torch.equal(tensor, torch.arange(1 << 22))


def test_an_engine_lets_go_of_the_weights_that_it_laid_out_anew(tmp_path: Path) -> None:
    save_variant(tmp_path, VARIANTS["llama"])
    (file,) = tmp_path.glob("*.safetensors")
    engine = engine_for(tmp_path)
    assert resident_kib(file) == 0
    assert score(engine, tokens(5), [5]).isfinite().all()
