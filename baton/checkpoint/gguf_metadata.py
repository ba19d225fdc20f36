"""Writes the metadata of a GGUF file as the files of a Hugging Face model folder.

The file is read once with ``gguf.GGUFReader``, which takes seconds; the folder that
this makes is read in milliseconds. Beside the usual files it holds an index of the
tensors, so that loading the weights needs no second read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.checkpoint.gguf_config import model_config
from baton.checkpoint.gguf_fields import GgufFields
from baton.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
from baton.checkpoint.hf_files import read_json
from baton.checkpoint.model_config import ModelConfig
from baton.errors import CheckpointError

CONVERTER_VERSION = 2
"""Raised whenever what is derived from a GGUF file changes; older caches are then ignored."""

TENSOR_INDEX = "gguf_tensors.json"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
METADATA_FILES = ("config.json", *TEXT_FILES, TENSOR_INDEX)

_ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that belongs to the configuration: it scales the rotary embedding."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in a GGUF file; ``shape`` has the outermost dimension first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def convert_metadata(path: Path, folder: Path) -> None:
    """Writes METADATA_FILES of the GGUF file ``path`` into ``folder``.

    Raises:
        CheckpointError: the file is damaged, or holds what is not supported.
    """
    fields, stored = _read(path)
    tensors = [
        GgufTensor(
            name=tensor.name,
            kind=tensor.tensor_type.name,
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            offset=int(tensor.data_offset),
            num_bytes=int(tensor.n_bytes),
        )
        for tensor in stored
        if tensor.name != _ROPE_FACTORS
    ]
    names = {tensor.name for tensor in tensors}
    config = model_config(fields, names, _rope_factors(path, stored))
    ModelConfig.from_json(config, where=str(path))  # complains of this file, not of the copy
    _write(folder / "config.json", config)
    (folder / "tokenizer.json").write_text(_tokenizer(fields), encoding="utf-8")
    _write(folder / "tokenizer_config.json", tokenizer_config(fields))
    _write(folder / "generation_config.json", _generation_config(fields))
    _write(folder / TENSOR_INDEX, {"tensors": [asdict(tensor) for tensor in tensors]})


def read_tensor_index(folder: Path) -> list[GgufTensor]:
    """The tensors of the GGUF file from which ``folder`` was made, in file order."""
    path = folder / TENSOR_INDEX
    try:
        return [
            GgufTensor(**{**entry, "shape": tuple(entry["shape"])})
            for entry in read_json(path)["tensors"]
        ]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); delete {folder}") from error


def stop_token_ids(fields: GgufFields) -> list[int]:
    """End of sequence, of turn and of message, as far as the file names them."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [fields.optional(f"tokenizer.ggml.{key}", int) for key in keys]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _read(path: Path) -> tuple[GgufFields, list[Any]]:
    try:
        from baton.checkpoint.gguf_reader import read_gguf
    except ImportError:
        raise CheckpointError(f"reading {path} needs the gguf package: pip install gguf") from None
    return read_gguf(path)


def _rope_factors(path: Path, tensors: Sequence[Any]) -> list[float] | None:
    for tensor in tensors:
        if tensor.name == _ROPE_FACTORS:
            if tensor.tensor_type.name != "F32" or tensor.data.ndim != 1:
                raise CheckpointError(
                    f"{path}: {_ROPE_FACTORS} is stored as {tensor.tensor_type.name} "
                    f"{tensor.shape.tolist()}; expected a row of F32"
                )
            return [float(value) for value in tensor.data]
    return None


def _tokenizer(fields: GgufFields) -> str:
    try:
        return build_tokenizer(fields).to_str()
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        fields.fail(f"tokenizer.ggml.*: no tokenizer can be made of it: {error}")


def _generation_config(fields: GgufFields) -> dict[str, Any]:
    return {
        "bos_token_id": fields.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": stop_token_ids(fields),
        "pad_token_id": fields.optional("tokenizer.ggml.padding_token_id", int),
    }


def _write(path: Path, data: dict[str, Any] | Sequence[Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
