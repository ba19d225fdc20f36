"""Reads the header of a GGUF file, whatever bytes are damaged in it.

The ``gguf`` package reads it; what that would do with impossible lengths is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
from gguf import GGUFValueType

from baton.checkpoint.gguf_fields import GgufFields
from baton.errors import CheckpointError

_MAX_ITEMS = 2 * 1024 * 1024
"""Of an array. The reader takes some 500 bytes for each: with more, a damaged length would
fill the memory before anything else is noticed. Vocabularies have up to 300,000 tokens."""


class _Reader(gguf.GGUFReader):
    """The package's own reads on past the file's end, for as many items as an array claims."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == GGUFValueType.ARRAY:
            kind = self._get(orig_offs, np.uint32)[0]
            num_items = self._get(orig_offs + 4, np.uint64)[0]
            if kind == GGUFValueType.ARRAY:
                raise ValueError(f"the array at byte {orig_offs} is one of arrays")
            if num_items > _MAX_ITEMS:
                raise ValueError(
                    f"the array at byte {orig_offs} has {num_items} items; "
                    f"expected at most {_MAX_ITEMS}"
                )
        return super()._get_field_parts(orig_offs, raw_type)


def read_gguf(path: Path) -> tuple[GgufFields, list[gguf.ReaderTensor]]:
    """Metadata and tensors; the tensors' data is mapped.

    Raises:
        CheckpointError: the file is truncated or damaged; the message names the field,
            if there is one.
    """
    try:
        # A sum that wraps around would point at another tensor.
        with np.errstate(over="raise"):
            reader = _Reader(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        # What numpy raises where a length or an offset points past the end of the file.
        damaged(path, f"{error}; it has {path.stat().st_size} bytes")
    if reader.byte_order != "I":
        damaged(path, "its byte order is not this machine's")
    values = {name: _contents(path, field) for name, field in reader.fields.items()}
    return GgufFields(where=str(path), values=values), reader.tensors


def damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: expected a complete GGUF file, but it is truncated or damaged ({reason})"
    )


def _contents(path: Path, field: gguf.ReaderField) -> Any:
    try:
        return field.contents()
    except (ValueError, LookupError) as error:  # text that is no UTF-8, for one
        damaged(path, f"{field.name}: {error}")
