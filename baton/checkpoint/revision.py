"""Names the content of a checkpoint: equal on every host that holds the same weights.

The name keys the cache of converted files and is part of the root of every block
hash, so two different checkpoints must not share one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from baton.errors import CheckpointError

REVISION_BYTES = 16

_EDGE_BYTES = 1024 * 1024
_NUM_PAGES = 256
_PAGE_BYTES = 4096


def content_revision(metadata: bytes, weight_files: Iterable[Path]) -> str:
    """A hex digest of ``metadata`` and of the weight files, in milliseconds.

    Of each file it covers the size, the first and the last MiB and 256 pages spread
    evenly between: checkpoints of one shape have equal sizes, equal headers and, after
    a partial fine-tune, often equal ends. Not all bytes are read, so this tells apart
    weights that were trained differently, but it is no check against tampering.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=REVISION_BYTES, person=b"baton-weights")
    digest.update(len(metadata).to_bytes(8, "little"))
    digest.update(metadata)
    for path in weight_files:
        try:
            _add_file(digest, path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _add_file(digest: hashlib.blake2b, path: Path) -> None:
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        digest.update(num_bytes.to_bytes(8, "little"))
        digest.update(os.pread(file.fileno(), _EDGE_BYTES, 0))
        middle = num_bytes - 2 * _EDGE_BYTES
        if middle > 0:
            for page in range(_NUM_PAGES):
                offset = _EDGE_BYTES + middle * page // _NUM_PAGES
                digest.update(os.pread(file.fileno(), _PAGE_BYTES, offset))
        if num_bytes > _EDGE_BYTES:
            last = max(_EDGE_BYTES, num_bytes - _EDGE_BYTES)
            digest.update(os.pread(file.fileno(), _EDGE_BYTES, last))
