"""The files of a Hugging Face model folder, read without ``transformers``.

``config.json``, ``tokenizer.json`` and safetensors weights are required;
``generation_config.json``, ``tokenizer_config.json``, ``special_tokens_map.json``
and ``chat_template.jinja`` are used where present.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import CheckpointError

SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TextFiles:
    """What the tokenizer's and the generation's files say about prompts and their end."""

    eos_token_ids: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


def require_model_folder(folder: Path, *, with_weights: bool = True) -> None:
    """Raises CheckpointError, naming every required file that ``folder`` lacks."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    weights = (SINGLE_WEIGHTS, WEIGHTS_INDEX)
    if with_weights and not any((folder / name).is_file() for name in weights):
        missing.append(f"{SINGLE_WEIGHTS} (or {WEIGHTS_INDEX} with its shards)")
    if missing:
        hint = ""
        if any(folder.glob("pytorch_model*.bin")):
            hint = "; pickled .bin weights are not supported, save the model as safetensors"
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}{hint}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder, in the order of their names.

    Raises:
        CheckpointError: the index is damaged, or a shard that it names is missing.
    """
    single = folder / SINGLE_WEIGHTS
    if single.is_file():
        return [single]
    index = folder / WEIGHTS_INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is no name of a file beside it")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {WEIGHTS_INDEX} names")
    return [folder / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises CheckpointError if there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # JSON as well as UTF-8
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path} has too many objects or lists in each other") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data


def read_text_files(folder: Path, config: Mapping[str, Any]) -> TextFiles:
    """Special tokens, stop ids and chat template; ``config`` is config.json's content."""
    tokens = _read_optional(folder / "special_tokens_map.json")
    tokenizer = _read_optional(folder / "tokenizer_config.json")
    eos_token = _token(tokenizer.get("eos_token")) or _token(tokens.get("eos_token"))
    return TextFiles(
        eos_token_ids=_eos_token_ids(folder, config, eos_token),
        bos_token=_token(tokenizer.get("bos_token")) or _token(tokens.get("bos_token")),
        eos_token=eos_token,
        chat_template=_chat_template(folder, tokenizer),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token(value: Any) -> str | None:
    """A special token is written as its text, or as an object with its text in ``content``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _eos_token_ids(folder: Path, config: Mapping[str, Any], eos: str | None) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the tokenizer's eos_token.

    The first knows best: chat models often end their turns with a token that the
    other two do not name.
    """
    generation = _read_optional(folder / "generation_config.json")
    for name, data in (("generation_config.json", generation), ("config.json", config)):
        value = data.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is {value!r}; expected token ids")
        if ids:
            return tuple(dict.fromkeys(ids))
    if eos is None:
        return ()
    tokenizer = read_json(folder / "tokenizer.json")
    for token in tokenizer.get("added_tokens") or ():
        if isinstance(token, Mapping) and token.get("content") == eos:
            if not isinstance(token.get("id"), int):
                raise CheckpointError(f"{folder / 'tokenizer.json'}: {eos!r} has no id")
            return (token["id"],)
    return ()


def _chat_template(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over the field; of several named ones ``default`` is taken."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, Mapping)]
        named = [entry for entry in named if entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None
