"""Compiles the Triton kernels for a GPU that is not there, and tells what each takes of it.

    python -m support.compiled_kernels 90

prints a line of JSON for each kernel, at the shapes of a Llama: bytes of shared memory, registers
of a thread, bytes that a thread spills. In a process of its own: where the interpreter was chosen,
nothing can be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kv_layout import KvLayout
from engine.attention import triton_kernels
from engine.attention.triton_paged import TritonPagedAttention
from engine.gpu import fused_kernels

_ALIGNED = ("row_stride", "table_stride")


def _compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> dict[str, int]:
    aligned = [name for name, kind in types.items() if kind[0] == "*" or name in _ALIGNED]
    source = ASTSource(
        kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip

    def told(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        return int(found[1]) if found else 0

    return {
        "shared": built.metadata.shared,
        "registers": told(r"Used (\d+) registers"),
        "spilled": told(r"(\d+) bytes spill stores"),
    }


def attention(
    capability: int, *, head_dim: int, group: int, window: int | None
) -> dict[str, dict[str, int]]:
    layout = KvLayout(2, 8, 2, 16, head_dim, "bfloat16")
    kv = torch.zeros(layout.shape, dtype=torch.bfloat16)
    bound = TritonPagedAttention(layout, kv, 8 * group)
    shape = {"GROUP": group, "WINDOW": window or 0, "PRECISION": "tf32", **bound._shape}
    query = {"query": "*bf16", "row_stride": "i32", "pool": "*bf16", "first_head": "i32"}
    table = {"block_table": "*i32", "table_stride": "i32"}
    decode, chunk = bound.decode_tiling, bound.chunk_tiling
    partial = {"contexts": "*i32", "out": "*bf16", "partial": "*fp32", "partial_log": "*fp32"}
    return {
        "attend_decodes": _compiled(
            triton_kernels.attend_decodes,
            query | table | partial | {"scale": "fp32"},
            {"NUM_SPLITS": 8, "ROWS": decode.rows, "TILE": decode.tile, **shape},
            capability, num_warps=decode.warps, num_stages=decode.stages,
        ),
        "attend_chunks": _compiled(
            triton_kernels.attend_chunks,
            query | table | {"tiles": "*i32", "out": "*bf16", "scale": "fp32"},
            {"ROWS": chunk.rows, "TILE": chunk.tile, **shape},
            capability, num_warps=chunk.warps, num_stages=chunk.stages,
        ),
    }  # fmt: skip


def others(capability: int) -> dict[str, dict[str, int]]:
    dims = {"HEAD_DIM": 128, "HEAD_PAD": 128}
    place = {"BLOCK_STRIDE": 1 << 20, "HEAD_STRIDE": 1 << 17, "BLOCK_SIZE": 16, **dims}
    write = {"key_value": "*bf16", "row_stride": "i32", "slots": "*i32", "pool": "*bf16"}
    merge = {"partial": "*fp32", "partial_log": "*fp32", "out": "*bf16"}
    norm = {"x": "*fp32", "delta": "*bf16", "weight": "*fp32", "out": "*bf16", "eps": "fp32"}
    rotate = {"heads": "*bf16", "row_stride": "i32", "cosines": "*fp32", "sines": "*fp32"}
    kinds: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "write_kv": (
            triton_kernels.write_kv, write | {"first_head": "i32"}, {"NUM_HEADS": 8, **place},
        ),
        "merge_splits": (
            triton_kernels.merge_splits, merge, {"NUM_SPLITS": 33, "SPLIT_PAD": 64, **dims},
        ),
        "add_rms_norm": (
            fused_kernels.add_rms_norm, norm,
            {"FEATURES": 4096, "FEATURES_PAD": 4096, "HAS_DELTA": True},
        ),
        "rotate": (
            fused_kernels.rotate, rotate,
            {"NUM_HEADS": 40, "HEADS_PAD": 64, "HALF": 64, "HALF_PAD": 64},
        ),
        "swiglu": (
            fused_kernels.swiglu, {"gate_up": "*bf16", "out": "*bf16"},
            {"FEATURES": 14336, "TILE": 1024},
        ),
    }  # fmt: skip
    return {name: _compiled(*kind, capability, num_warps=4) for name, kind in kinds.items()}


def main() -> None:
    capability = int(sys.argv[1])
    for head_dim, group, window in ((64, 4, None), (128, 4, None), (128, 8, 4096)):
        found = attention(capability, head_dim=head_dim, group=group, window=window)
        for name, each in found.items():
            print(json.dumps({"kernel": f"{name} {head_dim} {group} {window}", **each}))
    for name, each in others(capability).items():
        print(json.dumps({"kernel": name, **each}))


if __name__ == "__main__":
    main()
