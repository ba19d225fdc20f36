"""The cache folder: what is derived from a checkpoint once and used by every process.

A derived folder is built under a temporary name, flushed, and renamed into place
while an exclusive lock is held. So it is either absent or complete, whoever dies
when, and of many processes that want it at once one builds and the others wait.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.errors import CheckpointError


def cache_root() -> Path:
    """``$BATON_CACHE``, else ``$XDG_CACHE_HOME/baton``, else ``~/.cache/baton``."""
    if own := os.environ.get("BATON_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG base directory specification: a relative path is to be ignored.
    if (base := os.environ.get("XDG_CACHE_HOME")) and Path(base).is_absolute():
        return Path(base) / "baton"
    try:
        return Path.home() / ".cache" / "baton"
    except RuntimeError:
        raise CheckpointError("no home folder to cache in; set BATON_CACHE to a folder") from None


def build_once(folder: Path, files: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Makes ``folder`` hold ``files``, calling ``build(temporary folder)`` if it does not yet.

    Waits while another process builds the same folder. A folder that lost one of
    its files is built anew. Returns ``folder``.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    expected = tuple(files)
    if _is_complete(folder, expected):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{folder.name}.lock"):
            if not _is_complete(folder, expected):
                _build(folder, build)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the cache {folder}: {error.strerror or error}; "
            "free some space there or set BATON_CACHE to another folder"
        ) from error
    return folder


def _is_complete(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in files)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """An exclusive lock between processes; the kernel drops it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Builds and renames; the caller holds the lock."""
    prefix = f".{folder.name}.part-"
    _remove(folder.parent, prefix)  # what a builder left that was killed
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if folder.exists():  # incomplete: a file of it was deleted
            aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
            folder.rename(aside / "replaced")
        temporary.rename(folder)
        _flush(folder.parent)
    finally:
        _remove(folder.parent, prefix)


def _remove(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    """Waits until the file or folder is on the disk: a rename must not outrun its data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
