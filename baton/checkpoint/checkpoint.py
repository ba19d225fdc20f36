"""Opens a model's checkpoint: the one description that router and engine share.

Whatever the source, an opened checkpoint is a folder in the Hugging Face layout.
For a ``.gguf`` file that folder is made in the cache, once per content of the file.
No weight is read here, and torch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from baton.checkpoint.cache import build_once, cache_root
from baton.checkpoint.gguf_metadata import CONVERTER_VERSION, METADATA_FILES, convert_metadata
from baton.checkpoint.hf_files import (
    read_json,
    read_text_files,
    require_model_folder,
    weight_files,
)
from baton.checkpoint.model_config import ModelConfig
from baton.checkpoint.resolve import resolve_model
from baton.checkpoint.revision import content_revision
from baton.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "LoadFormat",
    "cache_root",
    "derived_folder",
    "open_checkpoint",
    "require_unchanged",
]


_DUMMY = "dummy weights 1"
"""To be changed with the way they are drawn."""

LoadFormat = Literal["auto", "dummy"]
"""Whether weights are those of the model, or random ones of their shapes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine.

    ``folder`` holds config.json, tokenizer.json and the other text files;
    ``weights_source`` is that same folder (safetensors) or the ``.gguf`` file.
    ``revision`` names the content: equal on every host with the same weights, and
    another for dummy weights.
    """

    name: str
    folder: Path
    weights_source: Path
    config: ModelConfig
    revision: str
    eos_token_ids: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    load_format: LoadFormat = "auto"


def open_checkpoint(model: str, load_format: LoadFormat = "auto") -> Checkpoint:
    """Opens a known name, a Hugging Face folder or a ``.gguf`` file.

    For the format "dummy" a folder needs no weights, and those of a file are not used.
    The first opening of a GGUF file takes seconds, every other one milliseconds.
    Safe in many processes at once.

    Raises:
        CheckpointError: there is no such model here, or it is incomplete, damaged or
            not supported; the message says which file or setting.
    """
    name, source = resolve_model(model)
    is_dummy = load_format == "dummy"
    if source.is_dir():
        require_model_folder(source, with_weights=not is_dummy)
        opened = _describe(name, source, source, _folder_revision(source, is_dummy))
        return replace(opened, load_format=load_format)
    revision = _gguf_revision(source)

    def convert(temporary: Path) -> None:
        convert_metadata(source, temporary)
        require_unchanged(source, revision)

    folder = build_once(derived_folder(revision, "metadata"), METADATA_FILES, convert)
    opened = _describe(name, folder, source, revision)
    if is_dummy:
        revision = content_revision(f"{_DUMMY} {revision}".encode(), [])
    return replace(opened, revision=revision, load_format=load_format)


def derived_folder(revision: str, part: str) -> Path:
    """Where the cache keeps one part of what is derived from a checkpoint."""
    return cache_root() / "checkpoints" / revision / part


def require_unchanged(path: Path, revision: str) -> None:
    """Keeps what was derived from another content out of the cache of ``revision``.

    Raises:
        CheckpointError: the ``.gguf`` file was replaced since its revision was taken.
    """
    if _gguf_revision(path) != revision:
        raise CheckpointError(f"{path} changed while it was being read; start again")


def _gguf_revision(path: Path) -> str:
    return content_revision(f"gguf converter {CONVERTER_VERSION}".encode(), [path])


def _folder_revision(folder: Path, is_dummy: bool) -> str:
    try:
        config = (folder / "config.json").read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}/config.json: {error.strerror}") from error
    if is_dummy:
        return content_revision(_DUMMY.encode() + config, [])
    return content_revision(config, weight_files(folder))


def _describe(name: str, folder: Path, source: Path, revision: str) -> Checkpoint:
    path = folder / "config.json"
    data = read_json(path)
    text = read_text_files(folder, data)
    return Checkpoint(
        name=name,
        folder=folder,
        weights_source=source,
        config=ModelConfig.from_json(data, where=str(path)),
        revision=revision,
        eos_token_ids=text.eos_token_ids,
        bos_token=text.bos_token,
        eos_token=text.eos_token,
        chat_template=text.chat_template,
    )
