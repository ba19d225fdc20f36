"""Reads and writes safetensors files; read tensors are views of the mapped file.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError
from engine.weights.on_demand import OnDemand
from engine.weights.tensor_shapes import (
    EMBEDDING,
    HEAD,
    Shape,
    check_shapes,
    dtype_of,
    expected_shapes,
    is_ignored,
)

_KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 64


def read_tensors(
    files: Iterable[Path], config: ModelConfig, dtype: torch.dtype
) -> Mapping[str, torch.Tensor]:
    """All tensors of the model, checked against ``config``, on the CPU.

    A tensor stored in ``dtype`` is a view of its file, mapped privately: its pages are
    shared between processes until somebody writes to them. Others are cast when they
    are asked for, each time to a copy that is the caller's. A few are always float32
    (``dtype_of``).

    Raises:
        CheckpointError: a tensor or a file is missing, surplus, misshapen, truncated
            or of an unsupported type.
    """
    files = list(files)
    found: dict[str, Shape] = {}
    for path in files:
        for name, shape in _read_shapes(path, config).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} is in another file too")
            found[name] = shape
    where = str(files[0] if len(files) == 1 else files[0].parent)
    expected = expected_shapes(config)
    tied_copy = config.tie_word_embeddings and found.get(HEAD) == expected[EMBEDDING]
    check_shapes({n: s for n, s in found.items() if n != HEAD or not tied_copy}, expected, where)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= _map_file(path, config)
    if tied_copy and not torch.equal(tensors.pop(HEAD).to(dtype), tensors[EMBEDDING].to(dtype)):
        raise CheckpointError(
            f"{where}: config.json sets tie_word_embeddings, but {HEAD} differs from {EMBEDDING}"
        )

    def make(name: str) -> torch.Tensor:
        # One that has the dtype already is returned as it is.
        return tensors[name].to(dtype_of(name, dtype))

    return OnDemand(tensors, make)


def _read_shapes(path: Path, config: ModelConfig) -> dict[str, Shape]:
    """Shapes of the file's tensors, from its header. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {}
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                if is_ignored(name, config):
                    continue
                part = file.get_slice(name)
                if part.get_dtype() not in _KINDS.values():
                    raise CheckpointError(
                        f"{path}: {name} is stored as {part.get_dtype()}; "
                        f"supported are {', '.join(_KINDS.values())}"
                    )
                shapes[name] = tuple(part.get_shape())
            return shapes
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a complete safetensors file, but it is truncated or damaged "
            f"({error}; it has {path.stat().st_size} bytes)"
        ) from error


def _map_file(path: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not is_ignored(name, config)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def write_tensors(
    path: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Writes one file while ``tensors`` are made, so that only one is in memory at a time.

    ``tensors`` yields exactly the names of ``shapes``, in any order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _KINDS[dtype],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % _ALIGNMENT)  # the data starts aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            assert tensor.shape == shapes[name], f"{name} is {tensor.shape}"
            file.seek(8 + len(encoded) + offsets.pop(name))
            file.write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    assert not offsets, f"never written: {sorted(offsets)}"
